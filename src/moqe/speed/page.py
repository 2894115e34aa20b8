"""A measurement as a table for the terminal."""

from __future__ import annotations

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from moqe.evaluate import format as write
from moqe.speed.run import Bench, Line

_COLUMNS = ("p50, ms", "p90, ms", "p99, ms", "first, ms", "prefill/s", "decode/s", "memory")


def bench_renderable(found: Bench) -> RenderableType:
    """One row a contestant, and below it where and how it was measured."""
    table = Table(box=box.SIMPLE, title=f"{found.requests} requests each, taking turns", title_justify="left")
    table.add_column("", overflow="fold")
    table.add_column("runtime", overflow="fold")
    for column in _COLUMNS:
        table.add_column(column, justify="right")
    for line in found.lines:
        table.add_row(line.name, line.runtime, *cells(line), style="bold" if line.kind == "mixture" else "")
    asked = (
        f"{found.prompt_tokens} tokens in, at most {found.new_tokens} out; rates in tokens"
        if _has_tokens(found)
        else "one image of noise"
    )
    where = "; ".join(f"{name} {value}" for name, value in found.machine.items())
    return Group(table, Text(f"A request: {asked}. {where}.", style="dim"))


def cells(line: Line) -> list[str]:
    """A contestant's numbers as text, in the order of the columns."""
    first = None if line.first_token is None else line.first_token.p50
    return [
        *(_milliseconds(value) for value in (line.latency.p50, line.latency.p90, line.latency.p99, first)),
        *("" if rate is None else f"{rate:,.0f}" for rate in (line.prefill_rate, line.decode_rate)),
        "" if line.resident_bytes is None else write.size(line.resident_bytes),
    ]


def _has_tokens(found: Bench) -> bool:
    return any(line.first_token is not None for line in found.lines)


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{1000 * seconds:,.1f}"
