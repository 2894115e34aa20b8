"""The routing curve: what a router's ranking of samples is worth, at every share of samples it might move."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moqe.evaluate.loss_table import Floats, LossTable
from moqe.evaluate.metrics import Metric
from moqe.evaluate.outcome import Outcome
from moqe.evaluate.verdict import Curve

POINTS = 51


def routing_curve(table: LossTable, best: int, deployed: Outcome, predicted: Floats, metric: Metric) -> Curve:
    """Mean value when a growing share of samples leaves expert `best`; see Curve.

    table: of the judged metric. deployed: the mixture's outcome. predicted: the router's costs before its guard,
    (n, experts), lower is better. The router's choice may be `best` itself, in which case leaving changes nothing.
    """
    n = len(table)
    wanted = predicted.argmin(1)
    predicted_gain = predicted[:, best] - predicted.min(1)
    leave = table.chosen(wanted) - table.loss[:, best]
    leave_best = table.chosen(metric.best(table.loss, 1)) - table.loss[:, best]
    true_gain = metric.gain(np.zeros(n), leave_best)
    start, total = float(table.loss[:, best].sum()), float(table.count.sum())
    moved = np.unique(np.linspace(0, n, POINTS).round().astype(np.int64))
    share = moved / n
    return Curve(
        share=share.tolist(),
        predicted=_running(start, leave, predicted_gain, moved, total),
        random=((start + share * leave.sum()) / total).tolist(),
        oracle=_running(start, leave_best, true_gain, moved, total),
        deployed_share=float(np.mean((deployed.asked[:, best] != 1) | (deployed.asked.sum(1) != 1))),
        deployed_value=float(deployed.values[table.metric].sum() / total),
    )


def _running(start: float, change: Floats, order_by: Floats, moved: NDArray[np.int64], total: float) -> list[float]:
    """The mean after the first `moved` samples have changed, in descending order of `order_by` (stable)."""
    order = np.argsort(-order_by, kind="stable")
    sums = np.concatenate([[0.0], np.cumsum(change[order])])
    values: list[float] = ((start + sums[moved]) / total).tolist()
    return values
