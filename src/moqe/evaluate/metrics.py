"""Metrics: what a verdict compares, the numbers that stand beside it, and how each of them is written.

Nats per token is what routers of texts predict and verdicts test. Perplexity is its exponential, for comparison with
the literature; bits per byte does not depend on the tokenizer. Images are judged by top-1 accuracy; top-5 accuracy and
cross-entropy stand beside it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Metric:
    """A mean over scored units.

    label: the title of its values. difference_label: what follows a difference. is_nats: whether perplexity and bits
    per byte follow from it. binary: whether a unit's value is 0 or 1. unit: what is scored. group: what a `domain` of
    samples is called. scale, digits: a value is written `scale * value` with so many digits.
    """

    name: str
    label: str
    difference_label: str
    lower_is_better: bool
    is_nats: bool
    binary: bool
    unit: Literal["tokens", "images"]
    group: Literal["domain", "class"]
    scale: float
    digits: int

    def best(self, values: NDArray[np.float64], axis: int) -> NDArray[np.int64]:
        """Index of the best value along an axis; the first of equals."""
        best: NDArray[np.int64] = np.argmin(values if self.lower_is_better else -values, axis=axis)
        return best

    def gain(self, reference: NDArray[np.float64], value: NDArray[np.float64]) -> NDArray[np.float64]:
        """By how much `value` is better than `reference`: positive is better, whatever the metric."""
        return reference - value if self.lower_is_better else value - reference

    def cost(self, value: NDArray[np.float64]) -> NDArray[np.float64]:
        """What a router is trained to make small: the value itself, or what it lacks to 1 where higher is better."""
        return value if self.lower_is_better else 1.0 - value

    def value_of_cost(self, cost: float) -> float:
        """The value that a cost stands for."""
        return cost if self.lower_is_better else 1.0 - cost


def _nats(name: str, unit: Literal["tokens", "images"], group: Literal["domain", "class"], is_nats: bool) -> Metric:
    label = f"nats per {unit.removesuffix('s')}"
    return Metric(name, label, label, True, is_nats, False, unit, group, 1.0, 4)


def _accuracy(name: str, title: str) -> Metric:
    return Metric(name, f"{title}, %", f"points of {title}", False, False, True, "images", "class", 100.0, 2)


METRICS: dict[str, Metric] = {
    "nats_per_token": _nats("nats_per_token", "tokens", "domain", is_nats=True),
    "top1": _accuracy("top1", "top-1 accuracy"),
    "top5": _accuracy("top5", "top-5 accuracy"),
    "cross_entropy": _nats("cross_entropy", "images", "class", is_nats=False),
}


def perplexity(nats: float, tokens: float) -> float:
    """exp(total nats / scored tokens): the effective number of equally likely next tokens."""
    return math.exp(nats / tokens)


def bits_per_byte(nats: float, text_bytes: float) -> float:
    """Bits needed per UTF-8 byte of the scored text: comparable between tokenizers."""
    return nats / math.log(2.0) / text_bytes
