"""The outcome of a verdict in plain words."""

from __future__ import annotations

from moqe.evaluate import format as write
from moqe.evaluate.metrics import Metric
from moqe.evaluate.significance import MINIMUM_DOCUMENTS, Interval


def sentence(difference: Interval, *, wins: bool, best: str, only_best: bool, cost: float, metric: Metric) -> str:
    """What a mixture is worth against the best single expert.

    best: that expert's name. only_best: whether the mixture asks nobody else. cost: the mixture's forward passes per
    sample, stated where they are not one.
    """
    basis = _basis(difference, metric)
    if cost != 1.0:
        basis += f", {write.cost(cost)} forward passes per {'image' if metric.unit == 'images' else 'sample'}"
    interval, unit = write.metric_interval(difference, metric), metric.difference_label
    numbers = f"{interval} {unit}, {write.p_statement(difference.p)}"
    if wins:
        size = write.number(abs(difference.value) * metric.scale, metric.digits)
        return (
            f"The mixture wins by {size} {unit} over {best}, the best single expert "
            f"(difference {interval}, {write.p_statement(difference.p)}, {basis})."
        )
    if only_best:
        return f"The mixture does not win here: every sample goes to {best}, the best single expert ({basis})."
    if difference.n_documents < MINIMUM_DOCUMENTS:
        return (
            f"The mixture does not win here: {basis} are too few to claim anything (at least {MINIMUM_DOCUMENTS} are "
            f"needed); its difference to {best}, the best single expert, is {numbers}."
        )
    if difference.excludes_zero():
        return (
            f"The mixture does not win here: it is worse than {best}, the best single expert, by {numbers} ({basis})."
        )
    return (
        f"The mixture does not win here: its difference to {best}, the best single expert, is {numbers}, "
        f"and the interval includes zero ({basis})."
    )


def _basis(difference: Interval, metric: Metric) -> str:
    """What was resampled: documents, or images where each is one."""
    if metric.unit == "images" and difference.n_documents == difference.n_samples:
        return f"{difference.n_documents:,} images"
    return f"{difference.n_documents} documents"
