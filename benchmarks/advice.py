"""What `moqe advise` predicts beside what `benchmarks.specialists` measured on the same texts.

    python -m benchmarks.advice --base MODEL --work FOLDER [--bits 4] [--variant text] [--seed 0] [--minutes 10]

FOLDER is that of `benchmarks.specialists`. Advice sees the documents that calibrated those experts and nothing else; it
is asked about mixtures of as many experts as were built. What it is compared with is the learned router's gain over the
generalist on the test windows, routed on their first 64 tokens and as a whole. Every run keeps its prediction beside
the outcomes, and the section lists all that FOLDER holds.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

import moqe
from benchmarks.domain_texts import DOMAINS
from benchmarks.specialists import OWN_WEIGHT, TEXT_WEIGHT
from benchmarks.specialists_tables import GENERALIST, MIXTURE, RESAMPLES, TEXT, pooled
from benchmarks.tables import table, write_section
from moqe.advice.page import advice_renderable
from moqe.cli import Bars
from moqe.data.protocols import WHOLE
from moqe.evaluate import intervals
from moqe.evaluate.format import signed, signed_interval
from moqe.store import read_json, write_json

PREDICTION = "advice.json"


def predict(base: Path, work: Path, folder: Path, options: argparse.Namespace) -> None:
    """Ask for advice on a run's calibration texts, and keep the row that matches what was built."""
    found = read_json(folder / "outcomes.json")
    built = sum(name == GENERALIST or name.startswith("for-") for name in _experts(found))
    advice = moqe.advise(
        str(base),
        [f"{work / f'texts-{options.seed}' / domain}-calibration.parquet={domain}" for domain in DOMAINS],
        bits=[options.bits],
        experts=[built],
        minutes=options.minutes,
        seed=options.seed,
        text_weight=TEXT_WEIGHT if options.variant.startswith(TEXT) else 0.0,
        own_weight=options.own_weight,
        progress=Bars(),
    )
    Console(width=160).print(advice_renderable(advice))
    (row,) = advice.rows
    kept = {"row": asdict(row), "minutes": sum(advice.seconds.values()) / 60, "steps": advice.steps}
    kept |= {"own_steps": advice.own_steps, "sentence": advice.sentence, "cut": advice.cut}
    write_json(folder / PREDICTION, kept)


def section(work: Path) -> str:
    """A row for every run that was predicted."""
    rows = []
    for path in sorted(work.glob(f"[234]-*/*/{PREDICTION}")):
        predicted, outcome = read_json(path), read_json(path.with_name("outcomes.json"))
        gain, name = predicted["row"]["gain"], path.parent.parent.name
        bits, variant = name.split("-", 1)
        (prefix, *_) = (protocol for protocol in outcome["protocols"] if protocol != WHOLE)
        cells = [bits, variant, str(outcome["seed"]), str(predicted["row"]["experts"]), f"{predicted['minutes']:.1f}"]
        cells += [f"{signed(gain['value'])} [{signed(gain['low'])}, {signed(gain['high'])}]"]
        for protocol in (prefix, WHOLE):
            ways, document, count, _ = pooled([outcome], protocol)
            won = (ways[GENERALIST] - ways[MIXTURE])[:, None]
            (bound,) = intervals(document, won, count, RESAMPLES, 0, differences=True)
            ratio = gain["value"] / bound.value if bound.value > 0 else math.nan
            cells += [signed_interval(bound), f"{ratio:.2f}"]
        rows.append(cells)
    header = ["bits", "variant", "seed", "experts", "minutes", "predicted [from, to]"]
    header += ["measured, prefix [95 %]", "predicted / measured", "measured, whole [95 %]", "predicted / measured"]
    return f"### What `moqe advise` predicted\n\n{table(header, rows)}"


def main() -> None:
    """Read the command line, predict, write the section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("docs/results.md"))
    parser.add_argument("--bits", type=int, choices=(2, 3, 4), default=4)
    parser.add_argument("--variant", default=TEXT)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--own-weight", type=float, default=OWN_WEIGHT, help="of the specialists that were built")
    options = parser.parse_args()
    runs = sorted(options.work.glob(f"{options.bits}-{options.variant}/seed-{options.seed}-*/outcomes.json"))
    if not runs:
        raise SystemExit("nothing to compare with: run benchmarks.specialists with the same --work first")
    predict(options.base, options.work, runs[-1].parent, options)
    write_section(options.out, "specialists-advice", section(options.work))


def _experts(found: dict[str, Any]) -> list[str]:
    """Names of the ways that are experts, generalist and specialists among them."""
    (first, *_) = found["protocols"].values()
    return list(first["ways"])


if __name__ == "__main__":
    main()
