"""Calibration images of which some are seen more often: what makes a specialist of an image method.

A method that trains takes images in random order, one after all others, so an image that is listed w times is seen w
times as often. The same holds for ranges of activations, for the Fisher information and for errors in certificates:
nothing in a method needs to know of weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moqe.methods.vision.method import CalibrationImages


@dataclass(frozen=True)
class RepeatedImages:
    """Those of `images` that `rows`, int64 (m,), lists, as often as it lists them. Satisfies `CalibrationImages`."""

    images: CalibrationImages
    rows: Tensor

    @property
    def labels(self) -> Tensor:
        """Classes, int64, (m,)."""
        labels = self.images.labels
        return labels[self.rows.to(labels.device)]

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, rows: Tensor) -> Tensor:
        """The images at these positions of the list, int64 (b,): float32, (b, 3, h, w)."""
        return self.images.batch(self.rows[rows.cpu()])


def weighted_rows(own: Tensor, weight: float, seed: int) -> Tensor:
    """Row numbers in random order: those with `own`, bool (n,), `weight` (at least 1) times, the others once.

    Of a weight with a fraction some own rows, drawn by `seed`, stand once more than the others. int64, about
    (n + (weight - 1) * own,).
    """
    generator = torch.Generator().manual_seed(seed)
    mine = torch.where(own)[0]
    whole, extra = int(weight), round((weight - int(weight)) * len(mine))
    once_more = mine[torch.randperm(len(mine), generator=generator)[:extra]]
    rows = torch.cat([torch.where(~own)[0], mine.repeat(whole), once_more])
    return rows[torch.randperm(len(rows), generator=generator)]
