"""How numbers are written: the only place that decides on digits, signs and units."""

from __future__ import annotations

from dataclasses import replace

from moqe.evaluate.metrics import Metric
from moqe.evaluate.significance import Interval

MINUS = "\N{MINUS SIGN}"
NONE = "\N{EN DASH}"


def number(value: float | None, digits: int = 4) -> str:
    """A value with a fixed number of digits; a dash where there is none."""
    return NONE if value is None else f"{value:.{digits}f}".replace("-", MINUS)


def signed(value: float, digits: int = 4) -> str:
    """A difference: always with a sign, except when it is zero to the digits written."""
    written = f"{value:+.{digits}f}"
    return (written if float(written) else written[1:]).replace("-", MINUS)


def bounds(low: float | None, high: float | None, digits: int = 4) -> str:
    """An interval in brackets; a dash where there were too few documents for one."""
    return NONE if low is None or high is None else f"[{number(low, digits)}, {number(high, digits)}]"


def signed_bounds(interval: Interval, digits: int = 4) -> str:
    """The interval of a difference in brackets; a dash where there were too few documents for one."""
    if interval.low is None or interval.high is None:
        return NONE
    return f"[{signed(interval.low, digits)}, {signed(interval.high, digits)}]"


def signed_interval(interval: Interval, digits: int = 4) -> str:
    """A difference with its interval: `-0.0120 [-0.0180, -0.0060]`."""
    return f"{signed(interval.value, digits)} {signed_bounds(interval, digits)}"


def metric_value(value: float | None, metric: Metric) -> str:
    """A value of a metric in the metric's own digits; accuracies in per cent, without the sign."""
    return number(None if value is None else metric.scale * value, metric.digits)


def metric_bounds(low: float | None, high: float | None, metric: Metric) -> str:
    """The interval of a metric's value in brackets."""
    if low is None or high is None:
        return NONE
    return bounds(metric.scale * low, metric.scale * high, metric.digits)


def metric_difference(difference: float, metric: Metric) -> str:
    """A difference of a metric, always with a sign; accuracies in points."""
    return signed(metric.scale * difference, metric.digits)


def metric_difference_bounds(difference: Interval, metric: Metric) -> str:
    """The interval of a metric's difference in brackets."""
    return signed_bounds(_scaled(difference, metric), metric.digits)


def metric_interval(difference: Interval, metric: Metric) -> str:
    """A metric's difference with its interval."""
    return signed_interval(_scaled(difference, metric), metric.digits)


def _scaled(interval: Interval, metric: Metric) -> Interval:
    low, high = (None if bound is None else metric.scale * bound for bound in (interval.low, interval.high))
    return replace(interval, value=metric.scale * interval.value, low=low, high=high)


def cost(passes: float) -> str:
    """Mean forward passes per sample: a whole number, or three digits after the point, two from 2 on."""
    return f"{passes:.0f}" if passes == int(passes) else f"{passes:.{3 if passes < 2 else 2}f}"


def p_value(p: float | None) -> str:
    """A p-value with two significant digits, and `< 0.0001` below that."""
    if p is None:
        return NONE
    return "< 0.0001" if p < 0.0001 else f"{p:.2g}"


def p_statement(p: float | None) -> str:
    """A p-value as part of a sentence: `p = 0.012` or `p < 0.0001`."""
    written = p_value(p)
    return f"p {written}" if written.startswith("<") else f"p = {written}"


def percent(share: float | None, digits: int = 0) -> str:
    """A share of one as per cent."""
    return NONE if share is None else f"{100 * share:.{digits}f} %".replace("-", MINUS)


def share_interval(interval: Interval | None) -> str:
    """A recovered share with its interval, in per cent."""
    if interval is None:
        return NONE
    if interval.low is None or interval.high is None:
        return percent(interval.value)
    return f"{percent(interval.value)} [{percent(interval.low)}, {percent(interval.high)}]"


def size(count: int) -> str:
    """Bytes in the unit that leaves one to four digits before the point."""
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.2f} GiB"
