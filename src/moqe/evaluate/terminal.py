"""The verdict and a mixture's contents as tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from moqe.evaluate import format as write
from moqe.evaluate.metrics import METRICS, Metric
from moqe.evaluate.telling import omission, telling
from moqe.evaluate.verdict import Line, ProtocolVerdict, Verdict

STYLES = {"base": "", "expert": "", "mixture": "bold", "policy": "", "router": "", "no skill": "dim", "bound": "dim"}

TOGETHER = (("mixture", "policy"), ("mixture", "router"), ("policy", "router"))  # with no rule between them


def verdict_renderable(verdict: Verdict) -> RenderableType:
    """The whole verdict: per protocol the tables and the outcome, the deployed protocol first; then the experts."""
    parts: list[RenderableType] = []
    for found in verdict.ordered:
        parts += [
            _main_table(verdict, found),
            _share_table(found, METRICS[verdict.metric]),
            _domain_table(found, METRICS[verdict.metric]),
            Text(_notes(found)),
            Text(found.sentence, style="bold green" if found.wins else "bold"),
            Text(),
        ]
    if verdict.adaptation:
        parts += [Text(verdict.adaptation), Text()]
    parts.append(_expert_table(verdict))
    parts.append(Text(f"recipe {verdict.recipe}", style="dim"))
    return Group(*parts)


def plan_table(prediction: Mapping[str, Any]) -> RenderableType:
    """What a dry run predicts, one row per entry; `_bytes` and `_seconds` at a name's end are its unit."""
    table = _table("Predicted")
    table.add_column("", overflow="fold")
    table.add_column("", justify="right", overflow="fold")
    for name, value in _flat(prediction):
        table.add_row(Text(name), Text(value))
    return table


def _flat(content: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """The entries of nested mappings, names joined by a space, values as text."""
    for key, value in content.items():
        name = f"{above}{key}"
        if isinstance(value, Mapping):
            yield from _flat(value, f"{name} ")
        elif name.endswith("_bytes"):
            yield name.removesuffix("_bytes").replace("_", " "), write.size(value)
        elif name.endswith("_seconds"):
            yield name.removesuffix("_seconds").replace("_", " "), f"{value:,.0f} s"
        else:
            yield name.replace("_", " "), str(value)


def inspection_table(found: Mapping[str, Any]) -> RenderableType:
    """What `inspect` returned: experts with bytes and substitutions, the recipe's hash, the outcome."""
    table = _table(f"Mixture {found['folder']}")
    for title in ("expert", "method", "scheme"):
        table.add_column(title, overflow="fold")
    for title in ("bits/weight", "own files", "substituted"):
        table.add_column(title, justify="right")
    for name, certificate in found["certificates"].items():
        table.add_row(
            Text(name),
            Text(certificate.get("method", "checkpoint")),
            Text(certificate.get("scheme", "as stored")),
            write.number(certificate.get("bits_per_weight"), 3),
            write.size(found["bytes"]["experts"][name]),
            write.percent(certificate.get("substituted_share"), 1),
        )
    parts: list[RenderableType] = [table]
    sizes = found["bytes"]
    parts.append(Text(f"folder {write.size(sizes['folder'])}, of which shared {write.size(sizes['shared'])}"))
    if found["verified"]:
        parts.append(Text("every file has the digest of the manifest"))
    verdict = found["verdict"]
    if verdict is not None:
        parts += [Text(f"{name}: {one['sentence']}") for name, one in verdict["protocols"].items()]
        parts.append(Text(f"recipe {verdict['recipe']}", style="dim"))
    return Group(*parts)


def _table(title: str) -> Table:
    return Table(
        title=Text(title, style="bold"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )


def _main_table(verdict: Verdict, found: ProtocolVerdict) -> Table:
    metric = METRICS[verdict.metric]
    table = _table(
        f"{found.protocol}: {found.n_samples:,} images"
        if metric.unit == "images"
        else f"{found.protocol}: {found.n_samples:,} samples, {found.n_documents:,} documents, {found.n_units:,} tokens"
    )
    longest = max(len(line.name) for line in found.lines)
    table.add_column("", overflow="fold", min_width=min(longest, 16))
    titles = [_in_two_lines(metric), "minus\nbest", "95 %\ninterval", "p"]
    titles += ["PPL"] if metric.is_nats else []
    titles += [_in_two_lines(METRICS[name]) for name in verdict.also]
    for title in [*titles, "cost"]:
        table.add_column(title, justify="right", no_wrap=True)
    sections = [line.kind for line in found.lines[1:]] + [""]
    for line, following in zip(found.lines, sections, strict=True):
        ends = line.kind != following and (line.kind, following) not in TOGETHER
        table.add_row(*_cells(line, metric, verdict.also), style=STYLES[line.kind], end_section=ends)
    return table


def _in_two_lines(metric: Metric) -> str:
    """A metric's label as a narrow title."""
    return metric.label.replace(" per ", " per\n").replace(" accuracy, ", "\n")


def _cells(line: Line, metric: Metric, also: Sequence[str]) -> list[Text]:
    against = line.difference
    cells = [line.name, write.metric_value(line.value, metric)]
    if against is None:
        cells += ["reference", "", ""]
    else:
        cells += [
            write.metric_difference(against.value, metric),
            write.metric_difference_bounds(against, metric),
            write.p_value(against.p).replace(" ", ""),
        ]
    if metric.is_nats:
        cells.append(write.number(line.perplexity, 2))
    cells += [write.metric_value(line.also.get(name), METRICS[name]) for name in also]
    return [Text(cell) for cell in [*cells, write.cost(line.cost)]]


def _class_share_table(found: ProtocolVerdict, metric: Metric) -> Table:
    """Classes down and experts across: there are more classes than experts."""
    table = _table("Share of images that each expert answers, by class")
    table.add_column("", overflow="fold")
    for name in found.experts:
        table.add_column(Text(name), justify="right", overflow="fold")
    for row in telling(found.domains, metric):
        table.add_row(Text(row.domain), *(write.percent(row.share[name]) for name in found.experts))
    table.add_section()
    table.add_row("all", *(write.percent(found.mixture.share[name]) for name in found.experts))
    return table


def _share_table(found: ProtocolVerdict, metric: Metric) -> Table:
    if metric.group == "class":
        return _class_share_table(found, metric)
    table = _table("Share of samples per expert and domain")
    table.add_column("", overflow="fold")
    for row in found.domains:
        table.add_column(Text(row.domain), justify="right", overflow="fold")
    table.add_column("all", justify="right", no_wrap=True)
    for name in found.experts:
        shares = [*(row.share[name] for row in found.domains), found.mixture.share[name]]
        table.add_row(Text(name), *(write.percent(share) for share in shares))
    return table


def _domain_table(found: ProtocolVerdict, metric: Metric) -> Table:
    omitted = omission(found.domains, metric)
    table = _table(f"The mixture by {metric.group}{f': {omitted}' if omitted else ''}")
    table.add_column("", overflow="fold")
    for title in (
        "images" if metric.unit == "images" else "samples",
        "mixture",
        "minus\nbest single",
        "95 %\ninterval",
        "p",
    ):
        table.add_column(title, justify="right", no_wrap=True)
    for row in telling(found.domains, metric):
        table.add_row(
            Text(row.domain),
            f"{row.n_samples:,}",
            write.metric_value(row.mixture, metric),
            write.metric_difference(row.difference.value, metric),
            write.metric_difference_bounds(row.difference, metric),
            write.p_value(row.difference.p),
        )
    return table


def _notes(found: ProtocolVerdict) -> str:
    """What the tables leave out, in sentences."""
    recovered = f"Share of the gap recovered: oracle {write.share_interval(found.oracle_share)}"
    if found.split_half_oracle is not None:
        recovered += f", split-half oracle {write.share_interval(found.split_half_share)}"
    if found.domain_label is not None:
        recovered += f", domain label {write.share_interval(found.domain_label_share)}"
    notes = [
        f"Best single expert, chosen on validation: {found.best_single} (best on test: {found.best_single_on_test}).",
        f"{recovered}.",
    ]
    if found.policies:
        notes.append(f"The mixture's policy is {found.policy}.")
    if found.domain_label is not None:
        notes.append("The line domain needs the label of each text: it is a bound and cannot be deployed.")
    bits = {
        line.name: line.bits_per_byte for line in found.lines if line.name in ("base", found.best_single, "mixture")
    }
    if all(value is not None for value in bits.values()):
        notes.append(
            "Bits per byte: " + ", ".join(f"{name} {write.number(value)}" for name, value in bits.items()) + "."
        )
    return " ".join([*notes, f"Losses by runtime {found.runtime}."])


def _expert_table(verdict: Verdict) -> Table:
    table = _table("On disk")
    for title in ("expert", "method", "scheme"):
        table.add_column(title, overflow="fold")
    for title in ("bits/weight", "alone", "substituted"):
        table.add_column(title, justify="right")
    for name, expert in verdict.experts.items():
        table.add_row(
            Text(name),
            Text(expert.method),
            Text(expert.scheme),
            write.number(expert.bits_per_weight, 3),
            write.size(expert.bytes_on_disk),
            write.percent(expert.substituted_share, 1),
        )
    table.add_section()
    table.add_row("base", "", "", "", write.size(verdict.base_bytes), "")
    table.add_row("mixture", "", "", "", write.size(verdict.mixture_bytes), "", style="bold")
    return table
