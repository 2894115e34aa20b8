"""Weighted least squares on ggml's sub-blocks: the scale (and min) that round a run of weights best.

Notation: a sub-block of n weights x with weights w is stored as codes q, integers in [low, high], and stands for
`s * q - m`. Symmetric types have no m. The error of a choice is `sum w (s q - m - x)^2`, with q the nearest codes.

The error has many local minima in s, because every s rounds another way. So both searches start from many ranges (the
whole span, spans that clip the extremes, spans somewhat too wide; both signs of s where [low, high] is lopsided),
solve for the best s and m with the codes held fixed, and keep what measures best.

Tensors are laid out (n, sub-blocks, blocks): sums run over the first dimension and everything is an elementwise
operation on long runs of memory. Sums are trees of elementwise additions, so that a block's result does not depend on
which blocks stand beside it. Own design; the format is ggml's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

HALF_MAX = 65504.0
HALF_MIN = 2.0**-24


@dataclass(frozen=True)
class Blocks:
    """Weights to be rounded. x: float32, (n, sub-blocks, blocks). weight: the same shape, positive, or None for ones.

    Codes lie in [low, high].
    """

    x: Tensor
    weight: Tensor | None
    low: int
    high: int

    def codes(self, scale: Tensor, minimum: Tensor | None) -> Tensor:
        """The nearest codes, as floats in x's shape, for scale and minimum (sub-blocks, blocks)."""
        shifted = self.x * reciprocal(scale) if minimum is None else (self.x + minimum).mul_(reciprocal(scale))
        return shifted.round_().clamp_(self.low, self.high)

    def error(self, scale: Tensor, minimum: Tensor | None) -> Tensor:
        """The weighted squared error of rounding with these: (sub-blocks, blocks)."""
        residual = self.codes(scale, minimum).mul_(scale)
        if minimum is not None:
            residual.sub_(minimum)
        return self.total(residual.sub_(self.x).square_())

    def total(self, values: Tensor) -> Tensor:
        """The weighted sum over each sub-block of values, which are overwritten: (sub-blocks, blocks)."""
        return tree_sum(values if self.weight is None else values.mul_(self.weight))

    def moments(self, codes: Tensor) -> Moments:
        """What a sub-block's error is made of while its codes stay as they are."""
        weighted = codes if self.weight is None else codes * self.weight
        return Moments(tree_sum(weighted), tree_sum(weighted * self.x), tree_sum(weighted * codes))


@dataclass(frozen=True)
class Moments:
    """Weighted sums over sub-blocks of q, q x and q^2, each (sub-blocks, blocks)."""

    q: Tensor
    qx: Tensor
    qq: Tensor


def tree_sum(values: Tensor) -> Tensor:
    """The sum over the first dimension, whose length is a power of two, in an order that depends on nothing else."""
    while values.shape[0] > 1:
        half = values.shape[0] // 2
        values = values[:half] + values[half:]
    return values[0]


def reciprocal(values: Tensor) -> Tensor:
    """1 / values, and 0 where values vanish: a block without scale has all codes zero."""
    return torch.where(values.abs() > 1e-30, 1 / values, 0.0)


def to_half(values: Tensor) -> Tensor:
    """Round to float16's numbers, in float32; what overflows saturates."""
    return values.clamp(-HALF_MAX, HALF_MAX).to(torch.float16).to(torch.float32)


def to_half_scale(values: Tensor) -> Tensor:
    """Like `to_half`, but what is not zero stays so: the smallest scale is better than none."""
    return to_half(values.abs().clamp(min=HALF_MIN) * values.sign())


def better(best: tuple[Tensor, ...] | None, candidate: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Elementwise the tuple whose first member, an error, is smaller; the older one in a tie."""
    if best is None:
        return candidate
    wins = candidate[0] < best[0]
    return tuple(torch.where(wins, new, old) for new, old in zip(candidate, best, strict=True))


def search_scale(blocks: Blocks, spans: tuple[float, ...], stored: bool) -> Tensor:
    """The best scale of every symmetric sub-block: (sub-blocks, blocks), of either sign.

    spans: candidates, as fractions of the scale that just covers the extremes. stored: the scale itself goes to the
    file as float16, so only such scales are considered.
    """
    keep = to_half_scale if stored else torch.clone
    top, bottom = blocks.x.amax(0), blocks.x.amin(0)
    covering = [torch.maximum(top / blocks.high, bottom / blocks.low)]
    if blocks.low != -blocks.high:
        covering.append(torch.minimum(top / blocks.low, bottom / blocks.high))
    best: tuple[Tensor, ...] | None = None
    for cover in covering:
        for span in spans:
            scale = keep(cover * span)
            best = better(best, (blocks.error(scale, None), scale))
    assert best is not None
    moments = blocks.moments(blocks.codes(best[1], None))
    scale = keep(moments.qx * reciprocal(moments.qq))
    return better(best, (blocks.error(scale, None), scale))[1]


def search_scale_and_minimum(
    blocks: Blocks, spans: tuple[tuple[float, float], ...], stored: bool
) -> tuple[Tensor, Tensor]:
    """The best scale, not negative, and minimum of every affine sub-block: each (sub-blocks, blocks).

    spans: candidate ranges as (fraction of the sub-block's own range, share of what is cut that is cut from below).
    stored: both go to the file as float16, and the minimum may have either sign. Otherwise they are still to be
    multiples of a super-block's, and the minimum must not be negative.
    """
    top, bottom = blocks.x.amax(0), blocks.x.amin(0)
    if not stored:
        top, bottom = top.clamp(min=0), bottom.clamp(max=0)
    # Measured from the bottom, so that a large common offset costs no precision.
    raised = Blocks(blocks.x - bottom, blocks.weight, blocks.low, blocks.high)
    floor = torch.full_like(bottom, -torch.inf) if stored else bottom
    weight, x = blocks.total(torch.ones_like(raised.x)), blocks.total(raised.x.clone())
    best: tuple[Tensor, ...] | None = None
    for span, below in spans:
        start = (top - bottom) * span
        cut = (top - bottom) * (below * (1 - span))
        moments = raised.moments(raised.codes(start / blocks.high, -cut))
        scale, minimum = _solve(moments, weight, x, floor)
        error = scale * (scale * moments.qq - 2 * (minimum * moments.q + moments.qx))
        error += minimum * (minimum * weight + 2 * x)  # up to the constant sum of w x^2
        best = better(best, (error, scale, minimum))
    assert best is not None
    winner = best[1:]
    refit = _solve(raised.moments(raised.codes(*winner)), weight, x, floor)
    best = None
    for scale, minimum in (winner, refit):
        pair = scale, minimum - bottom
        if stored:
            pair = to_half_scale(pair[0]), to_half(pair[1])
        best = better(best, (blocks.error(*pair), *pair))
    assert best is not None
    return best[1], best[2]


def _solve(moments: Moments, weight: Tensor, x: Tensor, floor: Tensor) -> tuple[Tensor, Tensor]:
    """The least-squares scale and minimum with codes held fixed, the minimum not below `floor`."""
    determinant = weight * moments.qq - moments.q * moments.q
    regular = determinant > 1e-6 * weight * moments.qq  # else all codes are alike, and the minimum takes what it can
    slope = torch.where(regular, weight * moments.qx - moments.q * x, 0.0) * reciprocal(determinant)
    minimum = torch.maximum((slope * moments.q - x) / weight, floor)
    scale = (moments.qx + minimum * moments.q) * reciprocal(moments.qq)
    return scale.clamp(min=0), minimum
