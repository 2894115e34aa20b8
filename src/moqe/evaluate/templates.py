"""The Jinja environment of card and report: strict about missing values, numbers written by `format`."""

from __future__ import annotations

from jinja2 import Environment, PackageLoader, StrictUndefined

from moqe.evaluate import format as write


def environment(*, html: bool) -> Environment:
    """An environment for this package's templates; with `html` everything inserted is escaped."""
    made = Environment(
        loader=PackageLoader("moqe", "evaluate"),
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
        "cell": lambda text: str(text).replace("|", "\\|").replace("\n", " "),
    }
    return made
