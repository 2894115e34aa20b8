"""Specialists that share codes, against every single expert of the same width, on six domains.

    python -m benchmarks.specialists --base MODEL --texts TEXTS --corpus CORPUS --work FOLDER [--bits 4] [--seed 0]

MODEL is a full-precision folder. TEXTS holds the files of `benchmarks.language`, CORPUS is a parquet file with the
columns `text`, `domain` and `source` (docs/results.md says which were used). FOLDER keeps experts and losses: the
command resumes, and takes over from other runs there what it has in common with them. What each way of choosing scored
on every test window goes to docs/measurements/specialists, and the tables are written from what is there.

A seed decides which documents calibrate, train routers and test, and everything drawn at random. Rows are pooled over
seeds; a difference is paired by window, and its interval is a bootstrap over documents. The best single expert is
chosen on each seed's validation documents, among all experts of that recipe: those of other methods, the distilled
generalist and each specialist. They read as many bytes per token as the mixture does. What the mixture's bytes in
storage buy as one model is measured too: the distilled generalist of one bit more, where FOLDER has it for the same
seed, and at 4 bits an imatrix expert of 5.5 bits (`--variant matched`).

With `--variant text`, or `text+clusters` and so on, the generalist and its specialists follow the base and the
calibration text half and half, all of them alike. Part of what they win then is that they adapt to the texts, which the
base could be trained to as well. Of clusters there are as many as `--specialists` names domains.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from benchmarks.domain_texts import DOMAINS, write_domain_texts
from benchmarks.language import score
from benchmarks.specialists_held_out import held_out_routing, shorter_prompts
from benchmarks.specialists_memory import memory_curve
from benchmarks.specialists_runs import KEPT, keep, read_kept, take_over
from benchmarks.specialists_tables import BEST, GENERALIST, GROUP, LABEL, MATCHED, TEXT, sections
from benchmarks.tables import write_section
from moqe.cli import Bars
from moqe.data.protocols import WHOLE
from moqe.evaluate import BASE, LossTable, read_losses
from moqe.evaluate.domain_label import fit_domain_label
from moqe.evaluate.judge import DOMAIN, PROBE, ROUTE
from moqe.evaluate.routing import RoutingData, answer, fit_routers
from moqe.folder import CERTIFICATE
from moqe.recipe import Recipe, parse_recipe
from moqe.store import read_json, write_json
from moqe.tasks import LanguageTask

SPLITS = ("router_train", "router_validation", "test")
KINDS: dict[str, dict[str, Any]] = {
    "codes": {},
    "clusters": {"by": "cluster"},
    "none": {"share": "none"},
    "rounds": {"rounds": 2},
}
VARIANTS = KINDS | {TEXT: {}} | {f"{TEXT}+{kind}": what for kind, what in KINDS.items() if what}
TEXT_WEIGHT = 0.5  # of the text in what experts of the variant `text` follow; the rest is the base
SAMPLES = 352  # windows of each domain for distillation; statistics take 64
OWN_WEIGHT = 32.0  # how much oftener a specialist sees its own
CONDITIONS = (
    "steps branch batch_windows learning_rate samples own_weight specialists router_samples test_samples runtime"
)
STEPS, BRANCH, WINDOWS = 120, 30, 4  # updates, of which the first are made once for all, and windows an update


def make_recipe(options: argparse.Namespace, texts: Path, bits: int, variant: str, seed: int) -> Recipe:
    """Experts of other methods at the same width, the generalist and its specialists; or the matched single experts."""
    seen = [domain for domain in DOMAINS if domain != options.hold_out]

    def sources(role: str, domains: list[str] | tuple[str, ...]) -> list[dict[str, Any]]:
        return [{"path": str(texts / f"{domain}-{role}.parquet"), "domain": domain} for domain in domains]

    scheme, group = f"w{bits}a16", {"group_size": GROUP, "symmetric": False}
    distill = {"steps": options.steps, "batch_windows": options.batch_windows, "learning_rate": options.learning_rate}
    distill |= {"samples": options.samples * len(seen)}
    if variant.startswith(TEXT):
        distill |= {"text_weight": TEXT_WEIGHT}
    if variant == MATCHED:
        kinds: dict[str, Any] = {
            "experts": [{"name": "imatrix-q5", "method": "imatrix", "scheme": "q5_k", "block_fallback": "q5_0"}]
        }
    else:
        # Steps made once for all: only experts with common codes can share them.
        branch = {"branch_after": options.branch} if VARIANTS[variant].get("share", "codes") == "codes" else {}
        by_cluster = VARIANTS[variant].get("by") == "cluster"
        wanted = {"count": len(options.specialists or DOMAINS)} if by_cluster else {"domains": options.specialists}
        kinds = {
            "experts": [
                {"name": "imatrix", "method": "imatrix", "scheme": scheme, **group},
                {"name": "gptq", "method": "gptq", "scheme": scheme, **group},
            ],
            "specialists": {
                "method": "gptq",
                "scheme": scheme,
                **group,
                "own_weight": options.own_weight,
                "distill": distill | branch,
                **wanted,
                **VARIANTS[variant],
            },
        }
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
                "calibration_precision": "auto",
                "router_samples": options.router_samples,
                "test_samples": options.test_samples,
            },
            **kinds,
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
    losses, splits = folder / "losses.parquet", SPLITS if recipe.specialists is not None else SPLITS[-1:]
    score(task, folder / "scores", (BASE, *names), splits, bars).merge(losses)
    found: dict[str, Any] = {"seed": seed, "bytes": sizes(folder, names), "made": made(folder, names), "protocols": {}}
    for protocol in task.protocols:
        test = read_losses(losses, "test", protocol, task.metric)
        facts = {
            "document": test.document.tolist(),
            "domain": test.domain.tolist(),
            "count": test.count.tolist(),
            "ways": {name: test.loss[:, column].tolist() for column, name in enumerate(names)},
        }
        facts["ways"][BASE] = test.base.tolist()
        if recipe.specialists is not None:
            facts |= route(task, losses, protocol, seed, bars, facts["ways"])
        found["protocols"][protocol] = facts
    write_json(outcome, found)


def route(
    task: LanguageTask, losses: Path, protocol: str, seed: int, bars: Bars, ways: dict[str, list[float]]
) -> dict[str, Any]:
    """Fit routers and add to `ways` what they, and all that is compared with them, score."""
    tables = {split: read_losses(losses, split, protocol, task.metric) for split in SPLITS}
    train, validation = (
        RoutingData(tables[split], tables[split], task.features(split, protocol)) for split in SPLITS[:2]
    )
    test, names = tables["test"], tables["test"].experts
    generalist = names.index(GENERALIST)
    fitted = fit_routers(train, validation, task.recipe.router, task.modality, seed, bars, generalist)
    label = fit_domain_label([tables[split] for split in SPLITS[:2]], generalist)
    assert label is not None
    answers = answer(
        {task.metric: test},
        task.features("test", protocol),
        fitted.routers,
        whole=None if protocol == WHOLE else read_losses(losses, "test", WHOLE, task.metric),
        labelled=label.choice(test),
    )
    best = int(tables["router_validation"].loss.sum(0).argmin())
    outcomes = {name: outcome for name, outcome in answers.outcomes.items() if name != ROUTE}
    ways |= {way(name): outcome.values[task.metric].tolist() for name, outcome in outcomes.items()}
    ways |= {BEST: test.loss[:, best].tolist()}
    ways |= {"oracle": test.loss.min(1).tolist(), "split-half oracle": split_half(test)}
    share = {name: dict(zip(names, outcome.share.tolist(), strict=True)) for name, outcome in outcomes.items()}
    return {BEST: names[best], "share": share}


def measure_more(recipe: Recipe, folder: Path, bars: Bars) -> None:
    """What takes experts that are there: the curve of memory, and routing of unknown domains and of few tokens."""
    found = read_json(folder / "outcomes.json")
    task = LanguageTask(recipe, folder)
    protocol = task.protocols[0]
    assert task.recipe.specialists is not None
    shared = all(expert.codes_of for expert in recipe.experts if expert.name.startswith("for-"))
    if shared and not (folder / "memory.json").exists():
        curve = memory_curve(task, folder, found["protocols"][protocol], protocol, bars)
        write_json(folder / "memory.json", curve)
    if task.recipe.specialists.by == "domain" and not (folder / "held-out.json").exists():
        write_json(folder / "held-out.json", held_out_routing(task, folder / "losses.parquet", protocol))
    if task.recipe.specialists.by == "domain" and not (folder / "prompts.json").exists():
        write_json(folder / "prompts.json", shorter_prompts(task, folder / "losses.parquet", protocol))


def way(name: str) -> str:
    """What a line of the table is called."""
    return {DOMAIN: LABEL, PROBE: "probe"}.get(name, f"router {name}")


def split_half(test: LossTable) -> list[float]:
    """The loss of every window when each half is scored by the expert that is best on the other half."""
    other, rows = test.halves.argmin(1), np.arange(len(test))  # (n, 2)
    found: list[float] = (test.halves[rows, other[:, 0], 1] + test.halves[rows, other[:, 1], 0]).tolist()
    return found


def made(folder: Path, names: tuple[str, ...]) -> dict[str, Any]:
    """What specialists' certificates say about rounds of alternation and about the windows they are for."""
    found = {name: read_json(folder / "experts" / name / CERTIFICATE).get("distilled") or {} for name in names}
    return {name: {key: facts[key] for key in ("rounds", "own") if facts.get(key)} for name, facts in found.items()}


def sizes(folder: Path, names: tuple[str, ...]) -> dict[str, int]:
    """Bytes on disk of one expert's weights, and of generalist and specialists together; shared files once."""

    def weights(experts: list[str]) -> int:
        files = [path for name in experts for path in (folder / "experts" / name).iterdir()]
        inodes = [path.stat() for path in files if path.suffix in (".safetensors", ".gguf")]
        return sum({entry.st_ino: entry.st_size for entry in inodes}.values())

    family = [name for name in names if name == GENERALIST or name.startswith("for-")]
    return {"one": weights([names[-1]]), "family": weights(family)}


def main() -> None:
    """Read the command line, make what is missing, write the section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("docs/results.md"))
    parser.add_argument("--kept", type=Path, default=KEPT, help="outcomes of all runs")
    parser.add_argument("--bits", type=int, choices=(2, 3, 4), default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--variant", choices=(*VARIANTS, MATCHED), default="codes")
    parser.add_argument("--hold-out", choices=DOMAINS, default="", help="a domain that only the test sees")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--branch", type=int, default=BRANCH)
    parser.add_argument("--batch-windows", type=int, default=WINDOWS)
    parser.add_argument("--specialists", nargs="+", choices=DOMAINS, help="domains that get one; all by default")
    parser.add_argument("--learning-rate", type=float, default=0.0015)
    parser.add_argument("--samples", type=int, default=SAMPLES, help="windows of each domain that distillation sees")
    parser.add_argument("--own-weight", type=float, default=OWN_WEIGHT)
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
    for what in take_over(recipe, folder, options.work):
        console.print(f"taken over: {what}")
    measure(recipe, folder, options.seed, bars)
    if options.variant != MATCHED and not options.hold_out:
        measure_more(recipe, folder, bars)
    conditions = {name: getattr(options, name) for name in CONDITIONS.split()}
    keep(folder, options.kept, kind, conditions)
    for name, content in sections(read_kept(options.kept)).items():
        write_section(options.out, f"specialists-{name}", content)


if __name__ == "__main__":
    main()
