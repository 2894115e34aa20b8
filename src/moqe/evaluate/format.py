"""How numbers are written: the only place that decides on digits, signs and units."""

from __future__ import annotations

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
