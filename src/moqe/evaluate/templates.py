"""The Jinja environment of card and report: strict about missing values, numbers written by `format`."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from moqe.evaluate import format as write
from moqe.evaluate.metrics import METRICS, Metric
from moqe.evaluate.telling import omission, telling


def environment(metric: Metric, *, html: bool) -> Environment:
    """An environment for this package's templates; with `html` everything inserted is escaped.

    metric: the judged one, which the filters without a metric's name write.
    """
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
        "value": lambda value: write.metric_value(value, metric),
        "value_of": lambda value, name: write.metric_value(value, METRICS[name]),
        "label_of": lambda name: METRICS[name].label,
        "bounds": lambda line: write.metric_bounds(line.low, line.high, metric),
        "difference": lambda value: write.metric_difference(value, metric),
        "difference_bounds": lambda interval: write.metric_difference_bounds(interval, metric),
        "difference_interval": lambda interval: write.metric_interval(interval, metric),
        "cost": write.cost,
        "telling": lambda rows: telling(rows, metric),
        "omission": lambda rows: omission(rows, metric),
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
