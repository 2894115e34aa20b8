"""The verdict and a mixture's contents as tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from moqe.evaluate import format as write
from moqe.evaluate.metrics import METRICS
from moqe.evaluate.verdict import Line, ProtocolVerdict, Verdict

STYLES = {"base": "", "expert": "", "mixture": "bold", "router": "", "no skill": "dim", "bound": "dim"}


def verdict_renderable(verdict: Verdict) -> RenderableType:
    """The whole verdict: per protocol the tables and the outcome, the deployed protocol first; then the experts."""
    parts: list[RenderableType] = []
    for found in verdict.ordered:
        parts += [
            _main_table(verdict, found),
            _share_table(found),
            _domain_table(found),
            Text(_notes(found)),
            Text(found.sentence, style="bold green" if found.wins else "bold"),
            Text(),
        ]
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
    units = "tokens" if metric.is_nats else "images"
    table = _table(
        f"{found.protocol}: {found.n_samples:,} samples, {found.n_documents:,} documents, {found.n_units:,} {units}"
    )
    longest = max(len(line.name) for line in found.lines)
    table.add_column("", overflow="fold", min_width=min(longest, 16))
    for title in (metric.label.replace(" per ", " per\n"), "minus\nbest", "95 %\ninterval", "p"):
        table.add_column(title, justify="right", no_wrap=True)
    if metric.is_nats:
        table.add_column("PPL", justify="right", no_wrap=True)
    table.add_column("cost", justify="right", no_wrap=True)
    sections = [line.kind for line in found.lines[1:]] + [""]
    for line, following in zip(found.lines, sections, strict=True):
        ends = line.kind != following and (line.kind, following) != ("mixture", "router")
        table.add_row(*_cells(line, metric.is_nats), style=STYLES[line.kind], end_section=ends)
    return table


def _cells(line: Line, is_nats: bool) -> list[Text]:
    against = line.difference
    cells = [line.name, write.number(line.value)]
    if against is None:
        cells += ["reference", "", ""]
    else:
        cells += [write.signed(against.value), write.signed_bounds(against), write.p_value(against.p).replace(" ", "")]
    if is_nats:
        cells.append(write.number(line.perplexity, 2))
    return [Text(cell) for cell in [*cells, f"{line.cost:g}"]]


def _share_table(found: ProtocolVerdict) -> Table:
    table = _table("Share of samples per expert and domain")
    table.add_column("", overflow="fold")
    for row in found.domains:
        table.add_column(Text(row.domain), justify="right", overflow="fold")
    table.add_column("all", justify="right", no_wrap=True)
    for name in found.experts:
        shares = [*(row.share[name] for row in found.domains), found.mixture.share[name]]
        table.add_row(Text(name), *(write.percent(share) for share in shares))
    return table


def _domain_table(found: ProtocolVerdict) -> Table:
    table = _table("The mixture by domain")
    table.add_column("", overflow="fold")
    for title in ("samples", "mixture", "minus\nbest single", "95 %\ninterval", "p"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in found.domains:
        table.add_row(
            Text(row.domain),
            f"{row.n_samples:,}",
            write.number(row.mixture),
            write.signed(row.difference.value),
            write.signed_bounds(row.difference),
            write.p_value(row.difference.p),
        )
    return table


def _notes(found: ProtocolVerdict) -> str:
    """What the tables leave out, in sentences."""
    split = write.share_interval(found.split_half_share)
    notes = [
        f"Best single expert, chosen on validation: {found.best_single} (best on test: {found.best_single_on_test}).",
        f"Share of the gap recovered: oracle {write.share_interval(found.oracle_share)}, split-half oracle {split}.",
    ]
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
