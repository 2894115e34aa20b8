"""The mean of per-sample values with a standard error that counts documents, not samples.

Samples of one document resemble each other, so n windows of g documents carry less than n independent observations.
The cluster-robust estimator (Liang and Zeger 1986, for the mean) sums deviations inside each document first:

    se^2 = g / (g - 1) * sum_documents (sum_{i in document} (x_i - mean))^2 / n^2

With one sample per document it is the usual s / sqrt(n).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ClusteredMean:
    """A mean, its standard error in the same unit, and how many documents it rests on."""

    value: float
    standard_error: float
    documents: int


def clustered_mean(values: Tensor, document: Sequence[str]) -> ClusteredMean:
    """Mean of `values`, (n,), with its standard error clustered by `document`, n ids; infinite for one document."""
    numbers = {name: number for number, name in enumerate(dict.fromkeys(document))}
    index = torch.tensor([numbers[name] for name in document])
    x = values.detach().double().cpu()
    mean = x.mean()
    count = len(numbers)
    if count < 2:
        return ClusteredMean(float(mean), math.inf, count)
    sums = torch.zeros(count, dtype=torch.float64).index_add_(0, index, x - mean)
    variance = count / (count - 1) * sums.square().sum() / len(x) ** 2
    return ClusteredMean(float(mean), float(variance.sqrt()), count)
