"""awq: enlarge the input channels that carry large activations before rounding, then cut off outliers where it pays.

Paper: Lin, Tang, Tang, Yang, Dang, Gan, Han, "AWQ: Activation-aware Weight Quantization for LLM Compression and
Acceleration", MLSys 2024 (arXiv 2306.00978), section 3.2 and appendix; clipping as in the authors' code.

A channel scale s = (mean |x|)^alpha, normalised to sqrt(max s * min s) = 1, is folded into what produces x; alpha is
the point of an even grid over [0, 1) with the least output error. Then each group's largest magnitude is shrunk to the
candidate with the least output error of that group.

Faithful: the scale, the grid, min-max grids, the two searches one after the other.
Different:
- No activations are kept. The squared output error of a change dW over the calibration tokens is tr(dW H dW^T),
  exactly, and the error of one group alone is that of its diagonal block of H, so both searches run on all tokens.
- The scale of linears with a common input minimises the sum of their own output errors; the authors run the whole
  attention or MLP module. alpha = 0 is among the points, so the scale never loses to no scale on its own measure.
- Query and key are clipped like all others, since their error is measured like all others.
- Grids are symmetric unless the scheme says otherwise.

Cost: grid_points * out * in^2 for the scale (the product with H), clip_steps * out * in * group_size for clipping.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from moqe.errors import NumericalError
from moqe.methods.grids import clipped_grid, group_width, minmax_grid, round_to_grid
from moqe.methods.method import Notes
from moqe.methods.output_error import output_error
from moqe.methods.statistics import InputStatistics
from moqe.quantized import IntegerTensor
from moqe.recipe import Expert
from moqe.schemes import Scheme

SMALLEST_SCALE = 1e-4  # of a channel, before normalising: a silent channel would otherwise give 0
CHUNK_ELEMENTS = 1 << 22


def channel_scale(absmean: Tensor, alpha: float) -> Tensor:
    """The paper's scale for one alpha: absmean^alpha, (in,), normalised so that its extremes multiply to 1."""
    scale = absmean.pow(alpha).clamp(min=SMALLEST_SCALE)
    return scale / (scale.max() * scale.min()).sqrt()


def search_scale(
    weights: Sequence[Tensor],
    statistics: InputStatistics,
    scheme: Scheme,
    grid_points: int,
    reduce: Callable[[Tensor], Tensor],
) -> tuple[Tensor, float]:
    """The scale (in,) with the least summed output error of the rounded linears, and its alpha.

    weights: float32, (out, in) each. reduce: applied to every candidate before it is measured.
    Raises NumericalError when no candidate gives a finite error.
    """
    absmean = statistics.absmean
    stacked = torch.cat(list(weights))  # (sum of out, in)
    best_error, best_alpha = float("inf"), -1.0
    best = torch.ones_like(absmean)
    for point in range(grid_points):
        alpha = point / grid_points
        scale = reduce(channel_scale(absmean, alpha))
        scaled = stacked * scale
        rounded = round_to_grid(scaled, *minmax_grid(scaled, scheme, torch.float32), scheme).dequantize()
        error = output_error(rounded / scale - stacked, statistics.hessian)
        if error < best_error:
            best_error, best_alpha, best = error, alpha, scale
    if best_alpha < 0:
        raise NumericalError("no channel scale gives a finite output error: check the base model's weights")
    return best, best_alpha


def search_clipping(
    weight: Tensor,
    hessian: Tensor,
    scheme: Scheme,
    scale_dtype: torch.dtype,
    steps: int,
    max_shrink: float,
) -> Tensor:
    """The share of each group's largest magnitude to keep, (out, groups): `steps` candidates down to 1 - max_shrink.

    The error of a group is e H_g e^T with H_g the diagonal block of H, (in, in), over the group's channels.
    """
    width = group_width(weight.shape[1], scheme)
    groups = weight.shape[1] // width
    diagonal_blocks = torch.stack(
        [hessian[g * width : (g + 1) * width, g * width : (g + 1) * width] for g in range(groups)]
    )  # (groups, width, width)
    chunks = []
    for rows in torch.split(weight, max(1, CHUNK_ELEMENTS // weight.shape[1])):
        best_error = rows.new_full((len(rows), groups), torch.inf)
        best = torch.ones_like(best_error)
        for step in range(steps):
            shrink = torch.full_like(best, 1.0 - max_shrink * step / steps)
            rounded = round_to_grid(rows, *clipped_grid(rows, shrink, scheme, scale_dtype), scheme).dequantize()
            residual = (rounded - rows).view(len(rows), groups, width).transpose(0, 1)  # (groups, rows, width)
            error = (torch.bmm(residual, diagonal_blocks) * residual).sum(-1).T  # (rows, groups)
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best = torch.where(better, shrink, best)
        chunks.append(best)
    return torch.cat(chunks)


class Awq:
    """Activation-aware scaling and clipping."""

    name = "awq"
    calibrated = True

    def supports(self, scheme: Scheme) -> str:
        """Integer schemes that leave activations in floating point: the paper is about weights only."""
        if scheme.is_block:
            return f"write method: imatrix for the block scheme {scheme.name}"
        if scheme.activation_bits < 16:
            return "it protects weights, not activations: write method: smoothquant, or scheme: w4a16"
        return ""

    def smooth(
        self,
        weights: Sequence[Tensor],
        statistics: InputStatistics,
        scheme: Scheme,
        expert: Expert,
        reduce: Callable[[Tensor], Tensor],
        notes: Notes,
    ) -> Tensor:
        """See `search_scale`; `expert.awq.grid_points` alphas are tried. Notes the alpha that was chosen."""
        scale, notes["alpha"] = search_scale(weights, statistics, scheme, expert.awq.grid_points, reduce)
        return scale

    def quantize(
        self,
        weight: Tensor,
        statistics: InputStatistics | None,
        scheme: Scheme,
        expert: Expert,
        scale_dtype: torch.dtype,
        notes: Notes,
    ) -> IntegerTensor:
        """Clip and round; options in `expert.awq`. Notes the mean share of the extremes that clipping kept."""
        if not expert.awq.clip:
            return round_to_grid(weight, *minmax_grid(weight, scheme, scale_dtype), scheme)
        if statistics is None:
            raise NumericalError("awq needs calibration statistics, and this layer has none")
        options = expert.awq
        hessian = statistics.hessian
        shrink = search_clipping(weight, hessian, scheme, scale_dtype, options.clip_steps, options.max_shrink)
        notes["kept_range"] = float(shrink.mean())
        return round_to_grid(weight, *clipped_grid(weight, shrink, scheme, scale_dtype), scheme)
