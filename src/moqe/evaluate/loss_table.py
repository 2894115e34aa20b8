"""The loss table: the loss of every expert on every sample, and what it was measured with.

On disk one parquet file in long form, one row per sample, expert and protocol; in memory one dense table per protocol.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class LossTable:
    """Losses of n samples under one protocol, measured by one runtime.

    loss: nats summed over a sample's scored tokens, (n, experts). base: the same for the base model, (n,).
    halves: the two halves of each sample's scored tokens, (n, experts, 2), which sum to `loss`.
    count: scored tokens, (n,). count_halves: (n, 2). text_bytes: UTF-8 bytes of the scored text, (n,).
    sample, document, domain: ids and labels, (n,). `experts` names the columns.
    """

    protocol: str
    runtime: str
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
        """Nats per token of every sample and expert, (n, experts): what routers are trained on."""
        return self.loss / self.count[:, None]

    def chosen(self, choice: NDArray[np.int64]) -> Floats:
        """Summed nats of every sample when sample i goes to expert `choice[i]`, (n,)."""
        return self.loss[np.arange(len(self)), choice]

    def select(self, rows: NDArray[np.bool_] | NDArray[np.int64]) -> LossTable:
        """The table of some samples only, by mask or by position."""
        per_sample = ("loss", "base", "halves", "count", "count_halves", "text_bytes", "sample", "document", "domain")
        return replace(self, **{name: getattr(self, name)[rows] for name in per_sample})

    def of(self, experts: Sequence[str]) -> LossTable:
        """The table of some experts only, in the given order. Raises ValueError for one it does not have."""
        columns = [self.experts.index(name) for name in experts]
        return replace(self, experts=tuple(experts), loss=self.loss[:, columns], halves=self.halves[:, columns])
