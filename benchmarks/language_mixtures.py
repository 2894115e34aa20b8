"""Mixtures of `benchmarks.language`: the tables of the paper, and the same int4 experts beside specialists."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from benchmarks.tables import table
from moqe.cli import Bars
from moqe.data.protocols import WHOLE
from moqe.evaluate import ProtocolVerdict, judge, read_losses
from moqe.evaluate.format import number, percent, share_interval, signed_interval
from moqe.evaluate.routing import RoutingData, answer, fit_routers
from moqe.recipe import GENERALIST, Recipe
from moqe.tasks import LanguageTask

INT8 = ("gptq-w8a16", "smoothquant-w8a8", "awq-w8a16", "kquants-q8_0", "imatrix-q8_0")
INT4 = ("gptq-w4a16", "smoothquant-w4a8", "awq-w4a16", "kquants-q4", "imatrix-q4")
PLAIN = ("rtn-w8a16", "rtn-w4a16")
INT3 = ("rtn-w3a16", "rtn-searched-w3a16", "imatrix-w3a16", "awq-w3a16", "gptq-minmax-w3a16", "gptq-w3a16")
FAMILY = (GENERALIST, "for-wikitext2", "for-c4", "for-openwebtext")
TABLES = {
    "Table 2: int8, four experts": INT8[:4],
    "Table 3: int4, four experts": INT4[:4],
    "Table 4: five experts, int8": INT8,
    "Table 4: five experts, int4": INT4,
}
WITH_FAMILY = {
    "Table 3, and gptq distilled": (*INT4[:4], GENERALIST),
    "Table 3, and specialists": (*INT4[:4], *FAMILY),
    "Table 4, int4, and gptq distilled": (*INT4, GENERALIST),
    "Table 4, int4, and specialists": (*INT4, *FAMILY),
}
ROUTER_SPLITS = ("router_train", "router_validation")
_PROTOCOLS = (WHOLE, "prefix-64")


def mixture_rows(verdicts: Sequence[ProtocolVerdict]) -> str:
    """One table's rows: nats per token and difference to the best single expert, per protocol."""
    header = ["line", *(f"{v.protocol}: nats [95 %]" for v in verdicts)]
    header += [f"{v.protocol}: minus best single [95 %]" for v in verdicts]
    order = [(line.kind, line.name) for line in verdicts[0].lines]
    rows = []
    for kind, name in order:
        lines = [next((x for x in v.lines if (x.kind, x.name) == (kind, name)), None) for v in verdicts]
        label = "mixture (`tuned`, guard)" if kind == "mixture" else f"router `{name}`" if kind == "router" else name
        values = ["" if x is None else f"{number(x.value)} [{number(x.low)}, {number(x.high)}]" for x in lines]
        differences = [
            "best single"
            if x is not None and x.difference is None
            else ""
            if x is None or x.difference is None
            else signed_interval(x.difference)
            for x in lines
        ]
        rows.append([label, *values, *differences])
    rows.append(["share of oracle gap", *(share_interval(v.oracle_share) for v in verdicts), *[""] * len(verdicts)])
    rows.append(
        ["share of split-half gap", *(share_interval(v.split_half_share) for v in verdicts), *[""] * len(verdicts)]
    )
    text = table(header, rows)
    for verdict in verdicts:
        paper = next(line for line in verdict.lines if line.name == "paper")
        claim = (
            "wins"
            if paper.difference is not None and paper.difference.excludes_zero() and paper.difference.value < 0
            else "does not win"
        )
        shares = ", ".join(f"{name} {percent(share)}" for name, share in verdict.mixture.share.items() if share > 0)
        text += f"\n\n**{verdict.protocol}.** {verdict.sentence} The paper's router {claim}. Shares: {shares}."
    return text


def verdicts(
    task: LanguageTask, recipe: Recipe, losses: Path, names: Sequence[str], bars: Bars, console: Console, title: str
) -> list[ProtocolVerdict]:
    """Fit the routers of a table's experts and judge them, per protocol."""
    found = []
    for protocol in _PROTOCOLS:
        tables = {
            split: read_losses(losses, split, protocol, task.metric).of(names) for split in (*ROUTER_SPLITS, "test")
        }
        train, validation = (
            RoutingData(tables[split], tables[split], task.features(split, protocol)) for split in ROUTER_SPLITS
        )
        fitted = fit_routers(
            train,
            validation,
            recipe.router,
            task.modality,
            recipe.seed,
            bars,
            names.index(GENERALIST) if GENERALIST in names else None,
        )
        test = {task.metric: tables["test"]}
        answers = answer(test, task.features("test", protocol), fitted.routers)
        found.append(
            judge(
                test,
                tables["router_validation"],
                answers.outcomes,
                recipe.seed,
                recipe.bootstrap_samples,
                predicted=answers.predicted,
            )
        )
        console.print(title, protocol, found[-1].sentence, json.dumps(fitted.selection["tuned"]["chosen"]))
    return found


def _windows(task: LanguageTask) -> str:
    """How many windows and documents each split has."""
    splits = task.splits()
    return ", ".join(f"{name} {len(split)} ({len(set(split.document))})" for name, split in splits.items())


def mixtures_section(task: LanguageTask, recipe: Recipe, losses: Path, bars: Bars, console: Console) -> str:
    """One table per set of experts."""
    text = f"""
## Mixtures on {Path(recipe.base).name}: Tables 2 to 4

Windows of {recipe.data.window} tokens (documents): {_windows(task)}. Best single expert: chosen on validation.
`prefix-64` routes on the first 64 tokens and scores the rest. Negative differences are better than the best single
expert. Each table asks four questions (two routers, two protocols); one interval in twenty misses zero by chance.
"""
    for title, names in TABLES.items():
        text += f"\n### {title}\n\n{mixture_rows(verdicts(task, recipe, losses, names, bars, console, title))}\n"
    return text


def specialists_section(task: LanguageTask, recipe: Recipe, losses: Path, bars: Bars, console: Console) -> str:
    """The int4 tables again, with gptq distilled as one more expert, and with the family of specialists."""
    assert recipe.specialists is not None
    distill = recipe.specialists.distill
    text = f"""
## Distilled and specialised experts on {Path(recipe.base).name}: Tables 3 and 4

The int4 experts above, made and scored anew, with products in bfloat16 while scoring.
`generalist` is gptq-w4a16 (group 64) distilled for {distill.steps} steps of {distill.batch_windows} windows on the
three corpora alike; `for-...` have its codes and see their own corpus {recipe.specialists.own_weight:g} times as often.
All follow the base's logits alone. Windows (documents): {_windows(task)}.
"""
    for title, names in WITH_FAMILY.items():
        text += f"\n### {title}\n\n{mixture_rows(verdicts(task, recipe, losses, names, bars, console, title))}\n"
    return text
