"""Metrics: what a verdict compares, and the numbers that stand beside it.

Nats per token is what routers predict and verdicts test. Perplexity is its exponential, for comparison with the
literature; bits per byte does not depend on the tokenizer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Metric:
    """A mean over scored units (tokens or images).

    label: how it is written after a number. is_nats: whether perplexity and bits per byte follow from it.
    """

    name: str
    label: str
    lower_is_better: bool
    is_nats: bool

    def best(self, values: NDArray[np.float64], axis: int) -> NDArray[np.int64]:
        """Index of the best value along an axis; the first of equals."""
        best: NDArray[np.int64] = np.argmin(values if self.lower_is_better else -values, axis=axis)
        return best

    def gain(self, reference: NDArray[np.float64], value: NDArray[np.float64]) -> NDArray[np.float64]:
        """By how much `value` is better than `reference`: positive is better, whatever the metric."""
        return reference - value if self.lower_is_better else value - reference


METRICS: dict[str, Metric] = {
    "nats_per_token": Metric("nats_per_token", "nats per token", lower_is_better=True, is_nats=True),
    "top1": Metric("top1", "top-1 accuracy", lower_is_better=False, is_nats=False),
}


def perplexity(nats: float, tokens: float) -> float:
    """exp(total nats / scored tokens): the effective number of equally likely next tokens."""
    return math.exp(nats / tokens)


def bits_per_byte(nats: float, text_bytes: float) -> float:
    """Bits needed per UTF-8 byte of the scored text: comparable between tokenizers."""
    return nats / math.log(2.0) / text_bytes
