"""Tables 2, 3 and 4 of the MoQE paper on a language model that fits a laptop, and the quality of the methods.

    python -m benchmarks.language --base MODEL --data TEXTS --work FOLDER [--out docs/results.md]

MODEL is a full-precision folder (docs/results.md says which one was used). TEXTS holds `wikitext2_raw_valid.txt`,
`wikitext2_raw_test.txt`, `wikitext2_raw_train_first1mb.txt`, `c4_train.parquet`, `c4_eval.parquet`,
`openwebtext_train.parquet` and `openwebtext_eval.parquet`. FOLDER keeps experts and losses: the command resumes.

All experts are made in one calibration pass and scored once; each table then takes its experts' columns, fits both
router presets on the router's documents and judges them on the test documents. Calibration, router and test documents
are disjoint; a difference's interval is a bootstrap over documents.
"""

from __future__ import annotations

import argparse
import math
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from benchmarks.language_mixtures import (
    FAMILY,
    INT3,
    INT4,
    INT8,
    PLAIN,
    ROUTER_SPLITS,
    mixtures_section,
    specialists_section,
)
from benchmarks.tables import table, write_section
from moqe.cli import Bars
from moqe.data.protocols import WHOLE
from moqe.evaluate import BASE, LossTable, LossTableFile, intervals, read_losses
from moqe.evaluate.format import signed_interval, size
from moqe.recipe import Recipe, parse_recipe
from moqe.store import read_json, write_json
from moqe.tasks import LanguageTask

DOMAINS = ("wikitext2", "c4", "openwebtext")
CHUNK = 16
OWN_WEIGHT, STEPS, BRANCH = 32.0, 64, 16  # of specialists, as in `benchmarks.specialists`


def experts() -> list[dict[str, Any]]:
    """All experts of all tables, as a recipe lists them."""

    def integer(name: str, method: str, scheme: str, group: int | None, **options: Any) -> dict[str, Any]:
        return {"name": name, "method": method, "scheme": scheme, "group_size": group, **options}

    def block(name: str, method: str, scheme: str, fallback: str) -> dict[str, Any]:
        return {"name": name, "method": method, "scheme": scheme, "block_fallback": fallback}

    return [
        integer("gptq-w8a16", "gptq", "w8a16", 0),
        integer("smoothquant-w8a8", "smoothquant", "w8a8", None),
        integer("awq-w8a16", "awq", "w8a16", 0),
        {"name": "kquants-q8_0", "method": "kquants", "scheme": "q8_0"},
        {"name": "imatrix-q8_0", "method": "imatrix", "scheme": "q8_0"},
        integer("gptq-w4a16", "gptq", "w4a16", 64),
        integer("smoothquant-w4a8", "smoothquant", "w4a8", 64),
        integer("awq-w4a16", "awq", "w4a16", 64),
        block("kquants-q4", "kquants", "q4_k", "q4_0"),
        block("imatrix-q4", "imatrix", "q4_k", "q4_0"),
        integer("rtn-w8a16", "rtn", "w8a16", 0),
        integer("rtn-w4a16", "rtn", "w4a16", 64),
        integer("rtn-w3a16", "rtn", "w3a16", 64),
        integer("rtn-searched-w3a16", "rtn", "w3a16", 64, rtn={"grid": "searched"}),
        integer("imatrix-w3a16", "imatrix", "w3a16", 64),
        integer("awq-w3a16", "awq", "w3a16", 64),
        integer("gptq-minmax-w3a16", "gptq", "w3a16", 64, gptq={"grid": "minmax"}),
        integer("gptq-w3a16", "gptq", "w3a16", 64),
    ]


def make_recipe(base: Path, data: Path, options: argparse.Namespace) -> Recipe:
    """The recipe of all experts on the three corpora."""

    def source(name: str, domain: str, **options: Any) -> dict[str, Any]:
        return {"path": str(data / name), "domain": domain, **options}

    wikitext = {"separator": "wikitext"}
    return parse_recipe(
        {
            "base": str(base),
            "data": {
                "calibration": [
                    source("wikitext2_raw_train_first1mb.txt", "wikitext2", **wikitext),
                    source("c4_train.parquet", "c4", max_documents=150),
                    source("openwebtext_train.parquet", "openwebtext", max_documents=150),
                ],
                "router": [
                    source("wikitext2_raw_valid.txt", "wikitext2", **wikitext),
                    source("c4_train.parquet", "c4", skip_documents=150),
                    source("openwebtext_train.parquet", "openwebtext", skip_documents=150),
                ],
                "test": [
                    source("wikitext2_raw_test.txt", "wikitext2", **wikitext),
                    source("c4_eval.parquet", "c4"),
                    source("openwebtext_eval.parquet", "openwebtext"),
                ],
                "window": 256,
                "calibration_samples": options.calibration_samples,
                "router_samples": options.router_samples,
                "test_samples": options.test_samples,
            },
            "experts": experts(),
            "router": {"preset": "tuned"},
            "protocol": {"route_on": "prefix", "prefix": 64},
        }
    )


class Clock:
    """Seconds by step, kept in a file so that a resumed run still knows what was measured."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.facts: dict[str, Any] = read_json(path) if path.exists() else {}

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Measure a block, unless it was measured before."""
        start = time.perf_counter()
        yield
        self.note(f"{name} seconds", round(time.perf_counter() - start, 1))
        self.note(f"{name} peak bytes", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)

    def note(self, name: str, value: Any) -> None:
        """Keep the first value of a fact."""
        self.facts.setdefault(name, value)
        write_json(self.path, self.facts)


def score(task: LanguageTask, work: Path, names: Sequence[str], splits: Sequence[str], bars: Bars) -> LossTableFile:
    """Score experts on splits, skipping what is scored already; return the table, not yet merged."""
    described = {split: task.describe(split) for split in splits}
    losses = LossTableFile(work / "parts", names, described, task.metrics, task.runtime_name, CHUNK)
    for name in names:
        pending = [chunk for split in splits for chunk in losses.pending(name, split)]
        with bars.track(f"score {name}", len(pending)) as advance:
            for chunk in pending:
                losses.add(chunk, task.losses(name, chunk.split, chunk.rows))
                advance(1)
    return losses


def quality(test: LossTable, names: Sequence[str], seed: int, resamples: int) -> str:
    """Perplexity of experts by domain, and their difference to the base with its interval."""
    rows = []
    base_total = test.base.sum() / test.count.sum()

    def perplexities(loss: np.ndarray[Any, Any]) -> list[str]:
        cells = []
        for domain in DOMAINS:
            rows_of = test.domain == domain
            cells.append(f"{math.exp(loss[rows_of].sum() / test.count[rows_of].sum()):.3f}")
        return [*cells, f"{math.exp(loss.sum() / test.count.sum()):.3f}"]

    rows.append([BASE, *perplexities(test.base), "", ""])
    for name in names:
        loss = test.loss[:, test.experts.index(name)]
        (difference,) = intervals(
            test.document, (loss - test.base)[:, None], test.count, resamples, seed, differences=True
        )
        ratio = math.exp(loss.sum() / test.count.sum() - base_total) - 1
        rows.append([name, *perplexities(loss), signed_interval(difference), f"{100 * ratio:+.2f} %"])
    header = ["expert", *(f"{domain} PPL" for domain in DOMAINS), "all PPL", "nats above base [95 %]", "PPL above base"]
    return table(header, rows)


def against(test: LossTable, names: Sequence[str], reference: str, seed: int, resamples: int) -> str:
    """Experts' paired difference to one of them, by domain, with its interval: negative is better."""
    rows = []
    for name in names:
        difference = test.loss[:, test.experts.index(name)] - test.loss[:, test.experts.index(reference)]
        cells = []
        for domain in (*DOMAINS, None):
            part = np.ones(len(test), bool) if domain is None else test.domain == domain
            (found,) = intervals(
                test.document[part], difference[part, None], test.count[part], resamples, seed, differences=True
            )
            cells.append(signed_interval(found))
        rows.append([name, *cells])
    return table([f"nats minus {reference} [95 %]", *DOMAINS, "all"], rows)


def main() -> None:
    """Read the command line, make what is missing, write the section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("docs/results.md"))
    parser.add_argument("--calibration-samples", type=int, default=96)
    parser.add_argument("--router-samples", type=int, default=216)
    parser.add_argument("--test-samples", type=int, default=144)
    parser.add_argument("--distill-samples", type=int, default=768, help="calibration windows that specialists see")
    parser.add_argument("--only", choices=("mixtures", "methods", "specialists"), help="write one of the sections")
    options = parser.parse_args()
    console, bars = Console(stderr=True), Bars()
    options.work.mkdir(parents=True, exist_ok=True)
    if options.only in (None, "specialists"):
        write_specialists(options, bars, console)
    if options.only == "specialists":
        return
    recipe = make_recipe(options.base, options.data, options)
    clock = Clock(options.work / f"facts-{recipe.hash}.json")
    task = LanguageTask(recipe, options.work / recipe.hash)
    with clock.step("all experts in one pass"):
        task.make_experts(bars)
    console.print("experts made", clock.facts)

    parts = options.work / f"losses-{recipe.hash}"
    splits = (*ROUTER_SPLITS, "test")
    mixed = (BASE, *INT8, *INT4)
    if options.only != "methods":
        score(task, parts, mixed, splits, bars).merge(parts / "losses.parquet")
        text = mixtures_section(task, recipe, parts / "losses.parquet", bars, console)
        write_section(options.out, "language-mixtures", text)
    if options.only != "mixtures":
        score(task, parts, (*mixed, *PLAIN, *INT3), ("test",), bars).merge(parts / "test.parquet")
        write_methods(options.out, task, recipe, parts / "test.parquet", clock, options)


def specialists_recipe(options: argparse.Namespace) -> Recipe:
    """The int4 experts of the tables, gptq distilled on all three corpora, and a specialist for each of them."""
    content = make_recipe(options.base, options.data, options).to_mapping()
    int4 = [expert for expert in content["experts"] if expert["name"] in INT4]
    family = {"method": "gptq", "scheme": "w4a16", "group_size": 64, "own_weight": OWN_WEIGHT}
    distill = {"steps": STEPS, "branch_after": BRANCH, "batch_windows": 4, "samples": options.distill_samples}
    return parse_recipe(
        content | {"runtime": "bfloat16", "experts": int4, "specialists": family | {"distill": distill}}
    )


def write_specialists(options: argparse.Namespace, bars: Bars, console: Console) -> None:
    """The section on a distilled expert and on specialists, from experts of their own."""
    recipe = specialists_recipe(options)
    task, parts = LanguageTask(recipe, options.work / recipe.hash), options.work / f"losses-{recipe.hash}"
    task.make_experts(bars)
    score(task, parts, (BASE, *INT4, *FAMILY), (*ROUTER_SPLITS, "test"), bars).merge(parts / "losses.parquet")
    text = specialists_section(task, recipe, parts / "losses.parquet", bars, console)
    write_section(options.out, "language-specialists", text)


def independent(task: LanguageTask, base: Path, work: Path) -> float:
    """Perplexity of the base on the test windows by `benchmarks.independent_perplexity`."""
    windows = work / "windows.npy"
    np.save(windows, task.splits()["test"].tokens.numpy())
    command = [sys.executable, "-m", "benchmarks.independent_perplexity", str(base), str(windows)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def write_methods(
    out: Path, task: LanguageTask, recipe: Recipe, losses: Path, clock: Clock, options: argparse.Namespace
) -> None:
    """The section on single experts."""
    test = read_losses(losses, "test", WHOLE, task.metric)
    ours = math.exp(float(test.base.sum() / test.count.sum()))
    if "independent perplexity" not in clock.facts:
        clock.note("independent perplexity", independent(task, options.base, losses.parent))
    theirs = float(clock.facts["independent perplexity"])
    splits = task.splits()
    documents = {name: len(set(split.document)) for name, split in splits.items()}
    seed, resamples = recipe.seed, recipe.bootstrap_samples
    three = test.of(INT3)
    best = INT3[int(three.loss.sum(0).argmin())]
    text = f"""
## Methods on {options.base.name}

Protocol `whole`, windows of {recipe.data.window} tokens, reference runtime. Windows (documents): calibration
{len(splits["calibration"])} ({documents["calibration"]}), test {len(splits["test"])} ({documents["test"]}). All
{len(recipe.experts)} experts come from one calibration pass; peak memory of making them
{size(clock.facts["all experts in one pass peak bytes"])}. Intervals: 95 %, bootstrap over documents.

Base perplexity {ours:.4f}; `benchmarks.independent_perplexity` on the same windows: {theirs:.4f}
({100 * (ours / theirs - 1):+.3f} %).

### 8 bits

{quality(test, ("rtn-w8a16", *INT8), seed, resamples)}

### 4 bits, group 64 (K-quants: q4_k, and q4_0 where a row is no multiple of 256)

{quality(test, ("rtn-w4a16", *INT4), seed, resamples)}

{against(test, ("gptq-w4a16", "awq-w4a16"), "rtn-w4a16", seed, resamples)}

### 3 bits, asymmetric, group 64

{quality(test, INT3, seed, resamples)}

Lowest at 3 bits: {best}. The others against it:

{against(test, [name for name in INT3 if name != best], best, seed, resamples)}
"""
    write_section(out, "language-methods", text)


if __name__ == "__main__":
    main()
