"""Which domains or classes a page with little room shows: those in which the mixture gains and loses most."""

from __future__ import annotations

from collections.abc import Sequence

from moqe.evaluate.metrics import Metric
from moqe.evaluate.verdict import DomainRow

ROOM = 12  # rows; a test of ten classes is shown whole


def telling(rows: Sequence[DomainRow], metric: Metric) -> list[DomainRow]:
    """All rows where there is room for them, else as many that gain most as lose most, in the order they came in.

    A gain or loss is counted in samples, not per sample: a class of two images is not worth a row.
    """
    if len(rows) <= ROOM:
        return list(rows)
    sign = -1.0 if metric.lower_is_better else 1.0
    order = sorted(range(len(rows)), key=lambda i: sign * rows[i].difference.value * rows[i].n_samples)
    kept = {*order[: ROOM // 2], *order[-ROOM // 2 :]}
    return [row for i, row in enumerate(rows) if i in kept]


def omission(rows: Sequence[DomainRow], metric: Metric) -> str:
    """What `telling` left out, for a title; empty where it left out nothing."""
    if len(rows) <= ROOM:
        return ""
    plural = {"class": "classes", "domain": "domains"}[metric.group]
    return f"the {ROOM} of {len(rows):,} {plural} that gain or lose most"
