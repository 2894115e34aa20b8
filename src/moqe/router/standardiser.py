"""Zero mean and unit variance per dimension, measured once on training data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Standardiser:
    """mean and deviation: float64, (dimension,); a dimension that did not vary is only centred."""

    mean: Tensor
    deviation: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Standardise rows: (n, dimension) -> float64, (n, dimension)."""
        return (x.double() - self.mean.to(x.device)) / self.deviation.to(x.device)


def fit_standardiser(x: Tensor) -> Standardiser:
    """Measure mean and deviation of rows, (n, dimension)."""
    rows = x.double()
    deviation = rows.std(0, correction=0)
    return Standardiser(rows.mean(0), torch.where(deviation > 0, deviation, torch.ones_like(deviation)))
