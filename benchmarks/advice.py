"""What `moqe advise` predicts beside what `benchmarks.specialists` measured on the same texts.

    python -m benchmarks.advice --base MODEL --texts TEXTS --corpus CORPUS --work FOLDER [--bits 4] [--variant text]

MODEL, TEXTS and CORPUS are those of `benchmarks.specialists`; what it measured is read from
docs/measurements/specialists. Advice sees the documents that calibrated those experts and nothing else; it is asked
about mixtures of as many experts as were built. What it is compared with is the learned router's gain over the
generalist on the test windows, routed on their first 64 tokens and as a whole. Predictions are kept beside the
outcomes, and the section lists all that are there.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

import moqe
from benchmarks.domain_texts import DOMAINS, write_domain_texts
from benchmarks.specialists import TEXT_WEIGHT
from benchmarks.specialists_runs import KEPT, read_kept
from benchmarks.specialists_tables import GENERALIST, MIXTURE, RESAMPLES, TEXT, Outcomes, pooled
from benchmarks.tables import table, write_section
from moqe.advice.page import advice_renderable
from moqe.cli import Bars
from moqe.data.protocols import WHOLE
from moqe.evaluate import intervals
from moqe.evaluate.format import signed, signed_interval
from moqe.store import read_json, write_json


def predict(found: Outcomes, options: argparse.Namespace) -> dict[str, Any]:
    """Ask for advice on a run's calibration texts: the row that matches what was built, and how it came about."""
    built = sum(name == GENERALIST or name.startswith("for-") for name in _experts(found))
    advice = moqe.advise(
        str(options.base),
        [f"{options.work / f'texts-{options.seed}' / domain}-calibration.parquet={domain}" for domain in DOMAINS],
        bits=[options.bits],
        experts=[built],
        minutes=options.minutes,
        seed=options.seed,
        text_weight=TEXT_WEIGHT if options.variant.startswith(TEXT) else 0.0,
        own_weight=found["conditions"]["own_weight"],
        progress=Bars(),
    )
    Console(width=160).print(advice_renderable(advice))
    (row,) = advice.rows
    kept = {"row": asdict(row), "minutes": sum(advice.seconds.values()) / 60, "steps": advice.steps}
    return kept | {"own_steps": advice.own_steps, "sentence": advice.sentence, "cut": advice.cut}


def section(kept: Path) -> str:
    """A row for every run that was predicted."""
    rows = []
    for kind, runs in read_kept(kept).items():
        for outcome in runs:
            path = prediction_path(kept, kind, outcome["seed"])
            if path.exists():
                rows.append(_row(kind, outcome, read_json(path)))
    header = ["bits", "variant", "seed", "experts", "minutes", "predicted [from, to]"]
    header += ["measured, prefix [95 %]", "predicted / measured", "measured, whole [95 %]", "predicted / measured"]
    return f"### What `moqe advise` predicted\n\n{table(header, rows)}"


def prediction_path(kept: Path, kind: str, seed: int) -> Path:
    """Where the prediction for a run lies."""
    return kept / kind / f"advice-{seed}.json"


def _row(kind: str, outcome: Outcomes, predicted: dict[str, Any]) -> list[str]:
    """Predicted and measured."""
    gain = predicted["row"]["gain"]
    (prefix, *_) = (protocol for protocol in outcome["protocols"] if protocol != WHOLE)
    cells = [*kind.split("-", 1), str(outcome["seed"]), str(predicted["row"]["experts"]), f"{predicted['minutes']:.1f}"]
    cells += [f"{signed(gain['value'])} [{signed(gain['low'])}, {signed(gain['high'])}]"]
    for protocol in (prefix, WHOLE):
        ways, document, count, _ = pooled([outcome], protocol)
        won = (ways[GENERALIST] - ways[MIXTURE])[:, None]
        (bound,) = intervals(document, won, count, RESAMPLES, 0, differences=True)
        ratio = gain["value"] / bound.value if bound.value > 0 else math.nan
        cells += [signed_interval(bound), f"{ratio:.2f}"]
    return cells


def main() -> None:
    """Read the command line, predict, write the section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("docs/results.md"))
    parser.add_argument("--bits", type=int, choices=(2, 3, 4), default=4)
    parser.add_argument("--variant", default=TEXT)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--kept", type=Path, default=KEPT, help="outcomes of all runs, and predictions")
    options = parser.parse_args()
    kind = f"{options.bits}-{options.variant}"
    runs = [run for run in read_kept(options.kept).get(kind, []) if run["seed"] == options.seed]
    if not runs:
        raise SystemExit(f"nothing to compare with in {options.kept}: run benchmarks.specialists first")
    write_domain_texts(options.texts, options.corpus, options.work / f"texts-{options.seed}", options.seed)
    write_json(prediction_path(options.kept, kind, options.seed), predict(runs[0], options))
    write_section(options.out, "specialists-advice", section(options.kept))


def _experts(found: dict[str, Any]) -> list[str]:
    """Names of the ways that are experts, generalist and specialists among them."""
    (first, *_) = found["protocols"].values()
    return list(first["ways"])


if __name__ == "__main__":
    main()
