"""Grids: the scales and zero points that integer codes of a weight refer to, and rounding onto them.

Two ways to choose a grid for a group of weights that share a scale:

- `minmax_grid` spans the extremes, as plain rounding has always done. A symmetric grid steps by max |w| over half the
  number of levels less a half (7.5 at 4 bits), so that the positive extreme is cut by half a step; this is what
  compressed-tensors' own observer does.
- `searched_grid` minimises the rounding error itself, sum of importance * (w - dequantized w)^2. The error is not
  convex in the scale, so it starts from a range of spans (and zero points) and alternates between the two halves that
  do have a closed form: codes given the scale, and the scale given the codes, a weighted least-squares fit. This is
  Lloyd's algorithm with evenly spaced levels.

In both, scales are rounded to the type they will be stored in before any code is chosen, so the codes are the best for
the file and not for numbers that nobody will read.

Cost of a search: 40 roundings of the weights (symmetric) or 170 (asymmetric). Memory is bounded by row chunks. On
SmolLM2-135M the error is within 2 % of an exhaustive search's.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from moqe.errors import NumericalError, UnsupportedLayer
from moqe.quantized import IntegerTensor
from moqe.schemes import Scheme

CHUNK_ELEMENTS = 1 << 18  # weights handled at once: a MiB each for the weights and every temporary
CANDIDATES = 16  # spans
REFITS = 3

Grid = tuple[Tensor, Tensor | None]


def minmax_grid(weight: Tensor, scheme: Scheme, scale_dtype: torch.dtype) -> Grid:
    """The grid that spans each group's extremes.

    weight: float32, (out, in). Returns scale, `scale_dtype`, (out, groups), and for asymmetric schemes zero points,
    uint8, (out, groups). A group of zeros gets scale 1. Raises UnsupportedLayer when the group size does not divide
    `in`, NumericalError when weights are not finite or overflow `scale_dtype`.
    """
    grouped = _grouped(weight, scheme)
    if scheme.symmetric:
        return _symmetric_scale(grouped.abs().amax(-1), scheme, scale_dtype), None
    low, high = grouped.amin(-1).clamp(max=0.0), grouped.amax(-1).clamp(min=0.0)
    scale = _stored((high - low) / scheme.levels[1], scale_dtype)
    return scale, _zero_point(low, scale, scheme)


def clipped_grid(weight: Tensor, shrink: Tensor, scheme: Scheme, scale_dtype: torch.dtype) -> Grid:
    """The min-max grid of the weights cut off at `shrink` times each group's largest magnitude.

    shrink: (out, groups) or a scalar tensor, in (0, 1]. The rest is as for `minmax_grid`.
    """
    grouped = _grouped(weight, scheme)
    limit = grouped.abs().amax(-1) * shrink  # (out, groups)
    clipped = torch.maximum(torch.minimum(grouped, limit[..., None]), -limit[..., None])
    return minmax_grid(clipped.reshape(weight.shape), scheme, scale_dtype)


def searched_grid(weight: Tensor, scheme: Scheme, scale_dtype: torch.dtype, importance: Tensor | None = None) -> Grid:
    """The grid with the least weighted squared rounding error among many candidates, never worse than `minmax_grid`.

    weight: float32, (out, in). importance: non-negative, (in,), for instance the mean square of each input channel;
    None weighs all alike. A group whose importance is all zero is searched as if it weighed all alike.
    Returns and raises as `minmax_grid` does.
    """
    parts = []
    for rows in _row_chunks(weight):
        grouped = _grouped(rows, scheme)  # (rows, groups, size)
        mass = _grouped_importance(importance, grouped)
        start = minmax_grid(rows, scheme, scale_dtype)
        parts.append(_Search(grouped, mass, scheme, scale_dtype, start).run())
    scale = torch.cat([part[0] for part in parts])
    zeros = [part[1] for part in parts if part[1] is not None]
    return scale, torch.cat(zeros) if zeros else None


def round_to_grid(weight: Tensor, scale: Tensor, zero_point: Tensor | None, scheme: Scheme) -> IntegerTensor:
    """The nearest codes of `weight`, float32 (out, in), on a grid whose scale is in its stored type."""
    grouped = _grouped(weight, scheme)
    zero = None if zero_point is None else zero_point.float()
    codes = _levels(grouped, scale.float(), zero, scheme)
    if zero is not None:
        codes.add_(zero[..., None])
    kind = torch.int8 if scheme.symmetric else torch.uint8
    return IntegerTensor(codes.to(kind).view(weight.shape), scale, zero_point, scheme)


def group_width(columns: int, scheme: Scheme) -> int:
    """Input channels per scale for rows of `columns`. Raises UnsupportedLayer when the group size does not divide."""
    width = scheme.group_size or columns
    if columns % width:
        workable = [size for size in (128, 64, 32) if columns % size == 0 and size < width]
        fix = f"set group_size to {workable[0]}" if workable else "set group_size to 0 (one scale per output channel)"
        raise UnsupportedLayer(f"rows of {columns} weights do not divide into groups of {width}: {fix}")
    return width


class _Search:
    """State of one search over a chunk of rows: the best grid so far and its error, per group."""

    def __init__(self, grouped: Tensor, mass: Tensor, scheme: Scheme, scale_dtype: torch.dtype, start: Grid) -> None:
        self.grouped, self.mass, self.scheme, self.scale_dtype = grouped, mass, scheme, scale_dtype
        self.weighted = mass * grouped
        # written again by every candidate: fresh memory for each would cost more than the arithmetic
        self.levels, self.work = torch.empty_like(grouped), torch.empty_like(grouped)
        self.scale, self.zero = start[0].float(), None if start[1] is None else start[1].float()
        self.error = torch.full_like(self.scale, torch.inf)
        self.offer(self.scale, self.zero)

    def offer(self, scale: Tensor, zero: Tensor | None) -> Tensor:
        """Keep a candidate where it beats the best; scale already rounded. Returns its levels until the next offer."""
        levels = _levels(self.grouped, scale, zero, self.scheme, out=self.levels)
        residual = torch.mul(levels, scale[..., None], out=self.work).sub_(self.grouped)
        error = residual.square_().mul_(self.mass).sum(-1)  # (rows, groups)
        better = error < self.error
        self.error = torch.where(better, error, self.error)
        self.scale = torch.where(better, scale, self.scale)
        if zero is not None and self.zero is not None:
            self.zero = torch.where(better, zero, self.zero)
        return levels

    def refit(self, levels: Tensor) -> Tensor:
        """The scale that fits given levels best, rounded; the best so far where no positive one exists."""
        numerator = torch.mul(self.weighted, levels, out=self.work).sum(-1)
        denominator = torch.mul(self.mass, levels, out=self.work).mul_(levels).sum(-1)
        scale = numerator / denominator
        return torch.where(torch.isfinite(scale) & (scale > 0), _round_scale(scale, self.scale_dtype), self.scale)

    def run(self) -> Grid:
        """Fit once from every candidate span, then alternate between codes and scales from the best one."""
        span, base = self.scale, self.zero
        for factor in _shrink_factors(self.scheme):
            scale = _round_scale(span * factor, self.scale_dtype)
            for zero in [None] if base is None else _shrunken_zeros(base, factor, self.scheme):
                levels = self.offer(scale, zero)
                self.offer(self.refit(levels), zero)
        for _ in range(REFITS):
            levels = self.offer(self.scale, self.zero)
            self.offer(self.refit(levels), self.zero)
        scale = self.scale.to(self.scale_dtype)
        return scale, None if self.zero is None else self.zero.to(torch.uint8)


def _shrink_factors(scheme: Scheme) -> list[float]:
    """Candidate spans relative to the extremes'.

    Few bits gain from cutting off much. Wider spans than the extremes help too: levels move onto weights that matter.
    """
    smallest, largest = (0.9, 1.1) if scheme.weight_bits == 8 else (0.35, 1.15)
    return [smallest + (largest - smallest) * index / (CANDIDATES - 1) for index in range(CANDIDATES)]


def _shrunken_zeros(zero: Tensor, factor: float, scheme: Scheme) -> Iterator[Tensor]:
    """Zero points for a span shrunk by `factor`: from cutting only the top to cutting only the bottom."""
    top = float(scheme.levels[1])
    upper = zero / factor  # the lowest weight stays at code 0
    lower = top - (top - zero) / factor  # the highest weight stays at the top code
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        yield torch.lerp(lower, upper, share).round_().clamp_(0.0, top)


def _levels(grouped: Tensor, scale: Tensor, zero: Tensor | None, scheme: Scheme, out: Tensor | None = None) -> Tensor:
    """Nearest codes less their zero points as floats, (rows, groups, size), written to `out` where it is given."""
    levels = torch.div(grouped, scale[..., None], out=out).round_()
    low, high = scheme.levels
    if zero is None:
        return levels.clamp_(low, high)
    torch.maximum(levels, (low - zero)[..., None], out=levels)  # faster than clamp_ with tensors
    return torch.minimum(levels, (high - zero)[..., None], out=levels)


def _symmetric_scale(extreme: Tensor, scheme: Scheme, scale_dtype: torch.dtype) -> Tensor:
    low, high = scheme.levels
    return _stored(extreme / ((high - low) / 2), scale_dtype)  # divided, so that an extreme lies half way exactly


def _zero_point(low: Tensor, scale: Tensor, scheme: Scheme) -> Tensor:
    return (-low / scale.float()).round_().clamp_(*scheme.levels).to(torch.uint8)


def _stored(scale: Tensor, scale_dtype: torch.dtype) -> Tensor:
    """Scales in the type of the file: groups of zeros get 1, and none is so small that it loses precision."""
    if not torch.isfinite(scale).all():
        raise NumericalError("weights are not finite: check the base model's files")
    stored = _round_scale(torch.where(scale > 0, scale, torch.ones_like(scale)), scale_dtype).to(scale_dtype)
    if not torch.isfinite(stored).all():
        raise NumericalError(
            f"scales overflow {str(scale_dtype).removeprefix('torch.')} (largest {float(scale.max()):.3g}): "
            "load the base model in bfloat16"
        )
    return stored


def _round_scale(scale: Tensor, scale_dtype: torch.dtype) -> Tensor:
    """Round to the stored type and back to float32, away from its subnormal numbers."""
    return scale.clamp(min=torch.finfo(scale_dtype).tiny).to(scale_dtype).float()


def _grouped(weight: Tensor, scheme: Scheme) -> Tensor:
    """(out, in) seen as (out, groups, group size)."""
    rows, columns = weight.shape
    return weight.view(rows, -1, group_width(columns, scheme))


def _grouped_importance(importance: Tensor | None, grouped: Tensor) -> Tensor:
    """Importance as (1, groups, size), with a mean of 1 per group so that float32 sums neither vanish nor overflow."""
    _, groups, size = grouped.shape
    if importance is None:
        return grouped.new_ones(1, groups, size)
    mass = importance.to(grouped).view(1, groups, size)
    mean = mass.mean(-1, keepdim=True)
    return torch.where(mean > 0, mass / mean, torch.ones_like(mass))


def _row_chunks(weight: Tensor) -> tuple[Tensor, ...]:
    return torch.split(weight, max(1, CHUNK_ELEMENTS // weight.shape[1]))
