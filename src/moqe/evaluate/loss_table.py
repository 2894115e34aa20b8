"""The loss table: what every metric says about every expert on every sample, and what it was measured with.

On disk one parquet file in long form, one row per sample, expert, metric and protocol; in memory one dense table per
metric and protocol.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class LossTable:
    """One metric of n samples under one protocol, measured by one runtime.

    loss: the metric summed over a sample's scored units (nats over tokens; 0 or 1 for an image's top-1 accuracy),
    (n, experts). base: the same for the base model, (n,). halves: the two halves of each sample's scored units,
    (n, experts, 2), which sum to `loss`. count: scored units, (n,). count_halves: (n, 2). text_bytes: UTF-8 bytes of
    the scored text, (n,). sample, document, domain: ids and labels, (n,). `experts` names the columns.
    """

    protocol: str
    runtime: str
    metric: str
    experts: tuple[str, ...]
    loss: Floats
    base: Floats
    halves: Floats
    count: Floats
    count_halves: Floats
    text_bytes: Floats
    sample: NDArray[np.int64]
    document: NDArray[np.str_]
    domain: NDArray[np.str_]

    def __len__(self) -> int:
        return int(self.loss.shape[0])

    @property
    def mean(self) -> Floats:
        """The metric per scored unit of every sample and expert, (n, experts)."""
        return self.loss / self.count[:, None]

    def chosen(self, choice: NDArray[np.int64]) -> Floats:
        """The sum of every sample when sample i goes to expert `choice[i]`, (n,)."""
        return self.loss[np.arange(len(self)), choice]

    def select(self, rows: NDArray[np.bool_] | NDArray[np.int64]) -> LossTable:
        """The table of some samples only, by mask or by position."""
        per_sample = ("loss", "base", "halves", "count", "count_halves", "text_bytes", "sample", "document", "domain")
        return replace(self, **{name: getattr(self, name)[rows] for name in per_sample})

    def of(self, experts: Sequence[str]) -> LossTable:
        """The table of some experts only, in the given order. Raises ValueError for one it does not have."""
        columns = [self.experts.index(name) for name in experts]
        return replace(self, experts=tuple(experts), loss=self.loss[:, columns], halves=self.halves[:, columns])
