"""The Jinja environment of card and report: strict about missing values, numbers written by `format`."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from moqe.evaluate import format as write


def environment(*, html: bool) -> Environment:
    """An environment for this package's templates; with `html` everything inserted is escaped."""
    made = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=html,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters |= {
        "number": write.number,
        "signed": write.signed,
        "bounds": lambda value, digits=4: write.bounds(value.low, value.high, digits),
        "signed_bounds": write.signed_bounds,
        "signed_interval": write.signed_interval,
        "p_value": write.p_value,
        "percent": write.percent,
        "share_interval": write.share_interval,
        "size": write.size,
        "cell": _cell,
    }
    return made


def _cell(text: str) -> str:
    """Text as the content of a Markdown table's cell: nothing in it is markup."""
    one_line = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    return "".join(f"\\{mark}" if mark in "\\|`*[]" else mark for mark in one_line)
