"""Learned thresholds with evenly spaced levels behind them, and their generalised straight-through gradient, for n2uq.

Paper: Liu, Cheng, Huang, Xing, Shen, "Nonuniform-to-Uniform Quantization", CVPR 2022 (arXiv 2111.14826), section 3.

Intervals a_1 ... a_K, K one less than the number of levels, begin at `start` and meet at edges e_0 = start,
e_i = e_{i-1} + a_i. If x is rounded at random, in interval i up to level i with chance (x - e_{i-1}) / a_i and down to
i - 1 otherwise, then its expected level is piecewise linear:

    E(x) = i - 1 + (x - e_{i-1}) / a_i        e_{i-1} < x <= e_i;   0 before e_0, K after e_K

Forward, x gets the more likely level: level i begins in the middle of interval i, at t_i = (e_{i-1} + e_i) / 2.
Backward, gradients are those of E: 1 / a_i for x, -(x - e_{i-1}) / a_i^2 for its own interval, -1 / a_i for the start
and every interval before. With equal intervals this is the ordinary straight-through estimator.

Thresholds and edges are looked up on the 16-bit grid that the file stores (`layer.Thresholds`), also while training, so
what is trained is what is measured, and a look-up costs a tenth of a search.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moqe.methods.vision.layer import FINE_LEVELS, Thresholds, Uniform, float32

SMALLEST_SHARE = 1e-3  # of an interval, relative to a uniform one: thresholds stay apart
HEADROOM = 1.5  # of the fine grid over the calibrated range: thresholds may move outwards


class LearnedThresholds(nn.Module):
    """A trained quantizer that starts as a uniform one.

    Parameters: `start` (), `intervals` (K,), in units of the input, and `scale` (), the distance of output levels.
    """

    intervals: Tensor

    def __init__(self, uniform: Uniform) -> None:
        super().__init__()
        self.bits, self.zero_point = uniform.bits, uniform.zero_point
        count = (1 << uniform.bits) - 1
        self.start = nn.Parameter(torch.tensor(-uniform.zero_point * uniform.scale))
        self.intervals = nn.Parameter(torch.full((count,), uniform.scale))
        self.scale = nn.Parameter(torch.tensor(uniform.scale))
        self.smallest = SMALLEST_SHARE * uniform.scale
        top = (FINE_LEVELS - 1) / HEADROOM
        self.fine_scale = float32(count * uniform.scale / top)
        margin = 0 if uniform.zero_point == 0 else round((FINE_LEVELS - 1 - top) / 2)
        self.fine_zero_point = margin + round(uniform.zero_point * uniform.scale / self.fine_scale)

    def edges(self) -> Tensor:
        """Where intervals meet, (K + 1,)."""
        return torch.cat([self.start[None], self.start + self.intervals.cumsum(0)])

    def forward(self, x: Tensor) -> Tensor:
        """x on its levels, float32."""
        last = x.movedim(1, -1)  # a view in one piece where training keeps images channels last
        flat = last.reshape(-1)
        fine = (flat.detach() / self.fine_scale).round_().add_(self.fine_zero_point)
        fine = fine.clamp_(0, FINE_LEVELS - 1).to(torch.int32)
        segments = self._table_of(self.edges().detach())
        levels: Tensor = _Level.apply(  # type: ignore[no-untyped-call]
            flat, self.start, self.intervals, fine, self.table(), segments
        )
        return ((levels - self.zero_point) * self.scale).view(last.shape).movedim(-1, 1)

    @torch.no_grad()
    def table(self) -> Tensor:
        """The level of each fine code: int64, (65536,)."""
        edges = self.edges()
        return self._table_of((edges[1:] + edges[:-1]) / 2)

    def stored(self) -> Thresholds:
        """The quantizer as it is stored."""
        return Thresholds(
            self.table().to(torch.uint8).cpu(),
            self.fine_scale,
            self.fine_zero_point,
            float32(float(self.scale.detach())),
            self.bits,
            self.zero_point,
        )

    @torch.no_grad()
    def keep_valid(self) -> None:
        """Call after every update: intervals stay positive, and so does the scale."""
        self.intervals.clamp_(min=self.smallest)
        self.scale.clamp_(min=self.smallest)

    def _table_of(self, bounds: Tensor) -> Tensor:
        """How many of the rising bounds lie below each fine code: int64, (65536,)."""
        first = (bounds / self.fine_scale).floor_().add_(self.fine_zero_point + 1)  # first code above a bound
        first = first.clamp_(0, FINE_LEVELS).to(torch.int64)
        rises = torch.zeros(FINE_LEVELS + 1, dtype=torch.int64, device=bounds.device)
        return rises.scatter_add_(0, first, torch.ones_like(first))[:FINE_LEVELS].cumsum(0)


class _Level(torch.autograd.Function):
    """The level of x, float32 (n,), with the gradients of E."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, start: Tensor, intervals: Tensor, fine: Tensor, levels: Tensor, segments: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, start, intervals, fine, segments)
        return levels.to(torch.float32).index_select(0, fine)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, start, intervals, fine, segments = ctx.saved_tensors
        segment = segments.index_select(0, fine)  # i where e_{i-1} < x <= e_i; 0 and K + 1 outside
        slopes = torch.nn.functional.pad(1.0 / intervals, (1, 1))  # (K + 2,)
        to_x = slopes.index_select(0, segment).mul_(gradient)  # gradient / a_i
        mass = torch.zeros_like(slopes).scatter_add_(0, segment, to_x)[1:-1]
        moment = torch.zeros_like(slopes).scatter_add_(0, segment, to_x * x)[1:-1]
        begins = start + intervals.cumsum(0) - intervals  # e_{i-1}
        behind = mass.sum() - mass.cumsum(0)  # of all intervals after the i-th
        to_intervals = -(moment - begins * mass) / intervals - behind
        return to_x, -mass.sum(), to_intervals, None, None, None
