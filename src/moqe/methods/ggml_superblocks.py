"""Super-blocks: sub-blocks whose scales (and mins) are small integers times one float16 (two) for 256 weights.

Four steps. (1) Find every sub-block's own best scale and min, as if they could be stored exactly. (2) With those codes
held fixed a sub-block's error is a quadratic in its scale and min; in this model, which costs almost nothing, try
several float16 factors and take the best integers for each. (3) On the stored values, with codes chosen anew for each
try, move every sub-block's integers to their neighbours. (4) Solve for the float16 factors by weighted least squares
with all integers held fixed, and keep them where the super-block's measured error falls. Own design.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from moqe.methods.ggml_search import (
    Blocks,
    Moments,
    better,
    reciprocal,
    search_scale,
    search_scale_and_minimum,
    to_half_scale,
    tree_sum,
)

_DIVISORS = 4  # candidates of each sign for the float16 factor of a symmetric super-block in step 2
_FACTORS = 3  # candidates for each float16 factor of an affine super-block in step 2
_NEIGHBOURS = tuple(move for move in product((-1, 0, 1), repeat=2) if move != (0, 0))


@dataclass(frozen=True)
class SymmetricFit:
    """Super-blocks that stand for `d * scales * q`. d: (blocks,), float16's numbers. scales: (sub-blocks, blocks)."""

    d: Tensor
    scales: Tensor


@dataclass(frozen=True)
class AffineFit:
    """Super-blocks that stand for `d * scales * q - dmin * mins`: (blocks,) and (sub-blocks, blocks), as floats."""

    d: Tensor
    dmin: Tensor
    scales: Tensor
    mins: Tensor


def fit_symmetric(
    blocks: Blocks, spans: tuple[float, ...], lowest: int, highest: int, moves: tuple[int, ...]
) -> SymmetricFit:
    """Fit symmetric super-blocks whose integer scales lie in [lowest, highest].

    moves: the steps of the integer scales tried in step 3; finer scales deserve more of them.
    """
    wanted = search_scale(blocks, spans, stored=False)  # (sub-blocks, blocks)
    curvature = blocks.moments(blocks.codes(wanted, None)).qq
    extreme = wanted.gather(0, wanted.abs().argmax(0, keepdim=True))[0]  # (blocks,)

    def integers(d: Tensor) -> Tensor:
        return (wanted * reciprocal(d)).round_().clamp_(lowest, highest)

    best: tuple[Tensor, ...] | None = None
    for divisor in (*range(lowest, lowest + _DIVISORS), *range(highest, highest - _DIVISORS, -1)):
        scales = integers(to_half_scale(extreme / divisor))
        along = tree_sum(curvature * scales * wanted)
        d = to_half_scale(along * reciprocal(tree_sum(curvature * scales.square())))
        best = better(best, (tree_sum(curvature * (d * integers(d) - wanted).square_()), d))
    assert best is not None
    d = best[1]
    start = integers(d)
    found = blocks.error(d * start, None), start
    for move in moves:
        scales = (start + move).clamp_(lowest, highest)
        error, scales = better(found, (blocks.error(d * scales, None), scales))
        found = error, scales
    error, scales = found
    moments = blocks.moments(blocks.codes(d * scales, None))
    along, norm = tree_sum(scales * moments.qx), tree_sum(scales.square() * moments.qq)
    refit = to_half_scale(along * reciprocal(norm))
    falls = tree_sum(blocks.error(refit * scales, None)) < tree_sum(error)
    return SymmetricFit(torch.where(falls, refit, d), scales)


def fit_affine(blocks: Blocks, spans: tuple[tuple[float, float], ...], highest: int) -> AffineFit:
    """Fit affine super-blocks whose integer scales and mins lie in [0, highest]."""
    model = _Quadratic.around(blocks, *search_scale_and_minimum(blocks, spans, stored=False))
    largest_scale, largest_minimum = model.scale.amax(0), model.minimum.amax(0)
    divisors = range(highest, max(highest - _FACTORS, 0), -1)
    best: tuple[Tensor, ...] | None = None
    for divisor in divisors:
        d = to_half_scale(largest_scale / divisor)
        scales = _integers(model.best_scale(model.minimum), d, highest)
        for other in divisors:
            dmin = to_half_scale(largest_minimum / other)
            mins = _integers(model.best_minimum(d * scales), dmin, highest)
            rescaled = _integers(model.best_scale(dmin * mins), d, highest)
            factors = _solve_factors(model.moments, model.weight, model.x, rescaled, mins)
            error = model.error(factors[0] * rescaled, factors[1] * mins)
            best = better(best, (tree_sum(error), *factors, rescaled, mins))
    assert best is not None
    _, d, dmin, scales, mins = best
    found: tuple[Tensor, ...] = blocks.error(d * scales, dmin * mins), scales, mins
    for step, other_step in _NEIGHBOURS:
        moved, other_moved = (scales + step).clamp_(0, highest), (mins + other_step).clamp_(0, highest)
        found = better(found, (blocks.error(d * moved, dmin * other_moved), moved, other_moved))
    error, scales, mins = found
    moments = blocks.moments(blocks.codes(d * scales, dmin * mins))
    new_d, new_dmin = _solve_factors(moments, model.weight, model.x, scales, mins)
    falls = tree_sum(blocks.error(new_d * scales, new_dmin * mins)) < tree_sum(error)
    return AffineFit(torch.where(falls, new_d, d), torch.where(falls, new_dmin, dmin), scales, mins)


@dataclass(frozen=True)
class _Quadratic:
    """Sub-blocks' errors as functions of scale and minimum with codes held fixed, up to a constant."""

    scale: Tensor
    minimum: Tensor
    moments: Moments
    weight: Tensor
    x: Tensor

    @classmethod
    def around(cls, blocks: Blocks, scale: Tensor, minimum: Tensor) -> _Quadratic:
        moments = blocks.moments(blocks.codes(scale, minimum))
        weight, x = blocks.total(torch.ones_like(blocks.x)), blocks.total(blocks.x.clone())
        return cls(scale, minimum, moments, weight, x)

    def best_scale(self, minimum: Tensor) -> Tensor:
        return (self.moments.qx + self.moments.q * minimum) * reciprocal(self.moments.qq)

    def best_minimum(self, scale: Tensor) -> Tensor:
        return (scale * self.moments.q - self.x) / self.weight

    def error(self, scale: Tensor, minimum: Tensor) -> Tensor:
        q, qx, qq = self.moments.q, self.moments.qx, self.moments.qq
        return scale * (scale * qq - 2 * (minimum * q + qx)) + minimum * (minimum * self.weight + 2 * self.x)


def _integers(values: Tensor, factor: Tensor, highest: int) -> Tensor:
    return (values * reciprocal(factor)).round_().clamp_(0, highest)


def _solve_factors(moments: Moments, weight: Tensor, x: Tensor, scales: Tensor, mins: Tensor) -> tuple[Tensor, Tensor]:
    """The least-squares d and dmin, as float16's numbers and not negative, with all integers held fixed."""
    aa, ab = tree_sum(scales.square() * moments.qq), tree_sum(scales * mins * moments.q)
    bb, ax = tree_sum(mins.square() * weight), tree_sum(scales * moments.qx)
    bx = tree_sum(mins * x)
    determinant = aa * bb - ab * ab
    inverse = torch.where(determinant > 1e-6 * aa * bb, reciprocal(determinant), 0.0)
    d, dmin = (ax * bb - ab * bx) * inverse, (ab * ax - aa * bx) * inverse
    # Where one of them would be negative or the two cannot be told apart, the one that explains more is left.
    only_d, only_dmin = ax.clamp(min=0) * reciprocal(aa), bx.clamp(max=0).neg() * reciprocal(bb)
    both = (d > 0) & (dmin > 0)
    first = ax * only_d >= -bx * only_dmin
    return (
        to_half_scale(torch.where(both, d, torch.where(first, only_d, 0.0))),
        to_half_scale(torch.where(both, dmin, torch.where(first, 0.0, only_dmin))),
    )
