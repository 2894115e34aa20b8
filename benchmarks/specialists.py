"""Specialists that share codes, against every single expert of the same width, on six domains.

    python -m benchmarks.specialists --base MODEL --texts TEXTS --corpus CORPUS --work FOLDER [--bits 4] [--seed 0]

MODEL is a full-precision folder. TEXTS holds the files of `benchmarks.language`, CORPUS is a parquet file with the
columns `text`, `domain` and `source` (docs/results.md says which were used). FOLDER keeps experts, losses and outcomes:
the command resumes, and every run writes the tables of all widths, variants and seeds that FOLDER holds.

A seed decides which documents calibrate, train routers and test, and everything drawn at random. Rows are pooled over
seeds; a difference is paired by window, and its interval is a bootstrap over documents. The best single expert is
chosen on each seed's validation documents, among all experts of that recipe: those of other methods, the distilled
generalist and each specialist.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from benchmarks.domain_texts import DOMAINS, write_domain_texts
from benchmarks.language import score
from benchmarks.tables import table, write_section
from moqe.cli import Bars
from moqe.data.protocols import WHOLE
from moqe.evaluate import BASE, LossTable, intervals, read_losses
from moqe.evaluate.domain_label import fit_domain_label
from moqe.evaluate.format import number, signed_interval
from moqe.evaluate.routing import RoutingData, answer, fit_routers
from moqe.recipe import Recipe, parse_recipe
from moqe.store import disk_bytes, read_json, write_json
from moqe.tasks import LanguageTask

SPLITS = ("router_train", "router_validation", "test")
GROUP = 64
GENERALIST, LABEL = "generalist", "domain label"
VARIANTS: dict[str, dict[str, Any]] = {
    "codes": {},
    "clusters": {"by": "cluster", "count": len(DOMAINS)},
    "none": {"share": "none"},
    "rounds": {"rounds": 2},
}
STEPS, BRANCH, WINDOWS = 144, 96, 2  # updates, of which the first are made once for all, and windows an update
SMALLEST_GAIN = {4: 0.008, 3: 0.02}  # nats that the mixture should win


def make_recipe(options: argparse.Namespace, texts: Path, bits: int, variant: str, seed: int) -> Recipe:
    """Experts of other methods at the same width, the generalist and its specialists."""
    seen = [domain for domain in DOMAINS if domain != options.hold_out]

    def sources(role: str, domains: list[str] | tuple[str, ...]) -> list[dict[str, Any]]:
        return [{"path": str(texts / f"{domain}-{role}.parquet"), "domain": domain} for domain in domains]

    scheme, group = f"w{bits}a16", {"group_size": GROUP, "symmetric": False}
    distill = {"steps": options.steps, "batch_windows": WINDOWS, "learning_rate": options.learning_rate}
    share = VARIANTS[variant].get("share", "codes")
    return parse_recipe(
        {
            "base": str(options.base),
            "runtime": options.runtime,
            "data": {
                "calibration": sources("calibration", seen),
                "router": sources("router", seen),
                "test": sources("test", DOMAINS),
                "window": 256,
                "calibration_samples": 64 * len(seen),
                "router_samples": options.router_samples,
                "test_samples": options.test_samples,
            },
            "experts": [
                {"name": "imatrix", "method": "imatrix", "scheme": scheme, **group},
                {"name": "gptq", "method": "gptq", "scheme": scheme, **group},
            ],
            "specialists": {
                "method": "gptq",
                "scheme": scheme,
                **group,
                "own_weight": options.own_weight,
                # Steps made once for all: only those with common codes can share them.
                "distill": distill | ({"branch_after": options.branch} if share == "codes" else {}),
                **VARIANTS[variant],
            },
            "router": {"preset": "tuned"},
            "protocol": {"route_on": "prefix", "prefix": 64},
            "seed": seed,
        }
    )


def measure(recipe: Recipe, folder: Path, seed: int, bars: Bars) -> None:
    """Make and score the experts, let every way of choosing answer the test windows, and keep what each scored."""
    outcome = folder / "outcomes.json"
    if outcome.exists():
        return
    task = LanguageTask(recipe, folder)
    task.make_experts(bars)
    names = tuple(expert.name for expert in recipe.experts)
    losses = folder / "losses.parquet"
    score(task, folder / "scores", (BASE, *names), SPLITS, bars).merge(losses)
    found: dict[str, Any] = {"bytes": sizes(folder, names), "protocols": {}}
    for protocol in task.protocols:
        tables = {split: read_losses(losses, split, protocol) for split in SPLITS}
        train, validation = (
            RoutingData(tables[split], tables[split], task.features(split, protocol)) for split in SPLITS[:2]
        )
        fitted = fit_routers(train, validation, recipe.router, task.modality, seed, bars, names.index(GENERALIST))
        test = tables["test"]
        label = fit_domain_label([tables[split] for split in SPLITS[:2]], names.index(GENERALIST))
        assert label is not None
        answers = answer(
            {task.metric: test},
            task.features("test", protocol),
            fitted.routers,
            whole=None if protocol == WHOLE else read_losses(losses, "test", WHOLE),
            labelled=label.choice(test),
        )
        best = int(tables["router_validation"].loss.sum(0).argmin())
        ways = {name: test.loss[:, column].tolist() for column, name in enumerate(names)}
        ways |= {way(name): x.values[task.metric].tolist() for name, x in answers.outcomes.items()}
        ways |= {BASE: test.base.tolist(), "best single": test.loss[:, best].tolist()}
        ways |= {"oracle": test.loss.min(1).tolist(), "split-half oracle": split_half(test)}
        found["protocols"][protocol] = {
            "document": [f"{seed}:{name}" for name in test.document],
            "domain": test.domain.tolist(),
            "count": test.count.tolist(),
            "best single": names[best],
            "ways": ways,
            "share": {name: dict(zip(names, x.share.tolist(), strict=True)) for name, x in answers.outcomes.items()},
        }
    write_json(outcome, found)


def way(name: str) -> str:
    """What a line of the table is called."""
    return {"domain": LABEL, "probe": "probe", "route": "mixture, one expert"}.get(name, f"router {name}")


def split_half(test: LossTable) -> list[float]:
    """The loss of every window when each half is scored by the expert that is best on the other half."""
    other, rows = test.halves.argmin(1), np.arange(len(test))  # (n, 2)
    found: list[float] = (test.halves[rows, other[:, 0], 1] + test.halves[rows, other[:, 1], 0]).tolist()
    return found


def sizes(folder: Path, names: tuple[str, ...]) -> dict[str, int]:
    """Bytes on disk of one expert, and of generalist and specialists together; shared files once."""
    family = [folder / "experts" / name for name in names if name == GENERALIST or name.startswith("for-")]
    inodes = {path.stat().st_ino: path.stat().st_size for place in family for path in place.glob("*.safetensors")}
    return {"one": disk_bytes(folder / "experts" / GENERALIST), "family": sum(inodes.values())}


def pooled(found: list[dict[str, Any]], protocol: str) -> tuple[dict[str, NDArray[np.float64]], NDArray[Any], Any, Any]:
    """Losses by way, documents, token counts and domains over the seeds."""
    parts = [one["protocols"][protocol] for one in found]
    ways = {
        name: np.concatenate([np.asarray(part["ways"][name]) for part in parts])
        for name in parts[0]["ways"]
        if all(name in part["ways"] for part in parts)
    }
    document = np.concatenate([np.asarray(part["document"]) for part in parts])
    count = np.concatenate([np.asarray(part["count"]) for part in parts])
    return ways, document, count, np.concatenate([np.asarray(part["domain"]) for part in parts])


def section(bits: int, variant: str, found: list[dict[str, Any]], hold_out: str) -> str:
    """The tables of one width and variant, pooled over its seeds."""
    text = [f"### {bits} bits, group {GROUP}, specialists: {variant}" + (f", without {hold_out}" if hold_out else "")]
    for protocol in found[0]["protocols"]:
        ways, document, count, domain = pooled(found, protocol)
        names = [name for name in ways if name != "best single"]
        values = np.stack([ways[name] for name in names], axis=1)
        against = {other: values - ways[other][:, None] for other in ("best single", GENERALIST)}
        bounds = {
            other: intervals(document, difference, count, 2000, 0, differences=True)
            for other, difference in against.items()
        }
        rows = [
            [
                name,
                number(float(values[:, column].sum() / count.sum())),
                *(signed_interval(bounds[other][column]) for other in against),
            ]
            for column, name in enumerate(names)
        ]
        chosen = ", ".join(sorted({one["protocols"][protocol]["best single"] for one in found}))
        header = ["line", "nats", f"minus best single ({chosen}) [95 %]", "minus generalist [95 %]"]
        text.append(f"**{protocol}**, {len(document)} windows, {len(found)} seeds.\n\n{table(header, rows)}")
        text.append(by_domain(ways, document, count, domain))
        text.append(claim(ways, document, count, bits))
    one, family = (float(np.mean([each["bytes"][key] for each in found])) for key in ("one", "family"))
    text.append(f"Generalist and specialists together take {family / one:.3f} times the bytes of one expert.")
    return "\n\n".join(text)


def by_domain(ways: dict[str, NDArray[np.float64]], document: NDArray[Any], count: Any, domain: Any) -> str:
    """Every specialist and the mixture minus the generalist, by domain of the test windows."""
    names = [name for name in ways if name.startswith("for-")] + ["router mixture"]
    found = np.unique(domain)
    rows = []
    for name in names:
        cells = []
        for one in found:
            part = domain == one
            difference = (ways[name] - ways[GENERALIST])[part, None]
            (bound,) = intervals(document[part], difference, count[part], 2000, 0, differences=True)
            cells.append(signed_interval(bound))
        rows.append([name, *cells])
    return table(["minus generalist [95 %]", *found], rows)


def claim(ways: dict[str, NDArray[np.float64]], document: NDArray[Any], count: Any, bits: int) -> str:
    """Whether the mixture wins, by how much of what was aimed at, and how much of the label's gain it collects."""
    gains = np.stack([ways["best single"] - ways[name] for name in ("router mixture", LABEL)], axis=1)
    mixture, label = intervals(document, gains, count, 2000, 0, differences=True)
    wins = mixture.excludes_zero() and mixture.value > 0
    aim = SMALLEST_GAIN.get(bits)
    parts = [
        f"The mixture {'wins' if wins else 'does not win'}: {mixture.value:+.4f} nats against the best single expert"
    ]
    if aim is not None:
        parts.append(f"{'at least' if wins and mixture.value >= aim else 'less than'} the {aim} aimed at")
    if label.value > 0:
        parts.append(
            f"{100 * mixture.value / label.value:.0f} % of what the domain label would gain ({label.value:+.4f})"
        )
    return "; ".join(parts) + "."


def recovered(found: list[dict[str, Any]]) -> str:
    """How much of gptq's loss against the base distillation alone takes back."""
    ways, document, count, _ = pooled(found, WHOLE)
    gap, left = (float((ways[name] - ways[BASE]).sum() / count.sum()) for name in ("gptq", GENERALIST))
    (bound,) = intervals(document, (ways[GENERALIST] - ways["gptq"])[:, None], count, 2000, 0, differences=True)
    share = 100 * (1 - left / gap)
    return (
        f"Distillation alone: {signed_interval(bound)} nats against gptq, {share:.0f} % of its loss against the base."
    )


def main() -> None:
    """Read the command line, make what is missing, write the section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("docs/results.md"))
    parser.add_argument("--bits", type=int, choices=(3, 4), default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--variant", choices=tuple(VARIANTS), default="codes")
    parser.add_argument("--hold-out", choices=DOMAINS, default="", help="a domain that only the test sees")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--branch", type=int, default=BRANCH)
    parser.add_argument("--learning-rate", type=float, default=0.001)
    parser.add_argument("--own-weight", type=float, default=8.0)
    parser.add_argument("--router-samples", type=int, default=240)
    parser.add_argument("--test-samples", type=int, default=240)
    parser.add_argument("--runtime", choices=("reference", "bfloat16"), default="reference")
    options = parser.parse_args()
    console, bars = Console(stderr=True), Bars()
    texts = options.work / f"texts-{options.seed}"
    write_domain_texts(options.texts, options.corpus, texts, options.seed)
    recipe = make_recipe(options, texts, options.bits, options.variant, options.seed)
    kind = f"{options.bits}-{options.variant}" + (f"-without-{options.hold_out}" if options.hold_out else "")
    folder = options.work / kind / f"seed-{options.seed}-{recipe.hash}"
    console.print(f"{kind}, seed {options.seed}: {folder}")
    measure(recipe, folder, options.seed, bars)
    for place in sorted(path for path in options.work.iterdir() if path.name[:2] in ("3-", "4-")):
        found = [read_json(path) for path in sorted(place.glob("*/outcomes.json"))]
        if found:
            bits, variant, *rest = place.name.split("-", 2)
            held = rest[0].removeprefix("without-") if rest else ""
            content = f"{section(int(bits), variant, found, held)}\n\n{recovered(found)}"
            write_section(options.out, f"specialists-{place.name}", content)


if __name__ == "__main__":
    main()
