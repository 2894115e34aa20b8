"""smoothquant: move the spread of the activations into the weights, so that both can be rounded.

Paper: Xiao, Lin, Seznec, Wu, Demouth, Han, "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large
Language Models", ICML 2023 (arXiv 2211.10438), section 4, equation 4:

    s_j = max|x_j|^alpha / max|w_j|^(1 - alpha),    x' = x / s,    W' = W * s

with the maximum over all linears that share the input, and activations rounded per token as the layer runs.

Faithful: the scale, its folding into the tensor before, 8-bit weights per output channel, dynamic 8-bit activations.
Different:
- Every input that can be folded is smoothed, also those of the attention output and down projections; the paper
  stops at inputs that follow a norm. The input of a gated MLP's down projection is where today's
  models have their outliers.
- Channels that no activation or weight reaches keep scale 1.
- Weight scales are searched, with the mean square of the smoothed inputs as importance, instead of spanning the
  extremes; this is what makes w4a8, which the paper does not have, worth using.

Cost: one pass over the weights for the scale, the grid search for rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from moqe.errors import NumericalError
from moqe.methods.grids import round_to_grid, searched_grid
from moqe.methods.method import Notes
from moqe.methods.statistics import InputStatistics
from moqe.quantized import IntegerTensor
from moqe.recipe import Expert
from moqe.schemes import Scheme

SMALLEST_SCALE = 1e-5


def smoothing_scale(weights: Sequence[Tensor], input_absmax: Tensor, alpha: float) -> Tensor:
    """Equation 4 for linears (out, in) that share an input with these channel maxima, (in,). Float32, (in,)."""
    weight_absmax = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)  # (in,)
    scale = (input_absmax.pow(alpha) / weight_absmax.pow(1.0 - alpha)).clamp(min=SMALLEST_SCALE)
    reached = (input_absmax > 0) & (weight_absmax > 0)
    return torch.where(reached, scale, torch.ones_like(scale))


class SmoothQuant:
    """Smoothing for quantized activations."""

    name = "smoothquant"
    calibrated = True

    def supports(self, scheme: Scheme) -> str:
        """Integer schemes with quantized activations."""
        if scheme.is_block:
            return f"write method: imatrix for the block scheme {scheme.name}"
        if scheme.activation_bits >= 16:
            return "it helps quantized activations only: write scheme: w8a8 or w4a8, or another method"
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
        """See `smoothing_scale`; `expert.smoothquant.alpha` is the migration strength."""
        return reduce(smoothing_scale(weights, statistics.absmax, expert.smoothquant.alpha))

    def quantize(
        self,
        weight: Tensor,
        statistics: InputStatistics | None,
        scheme: Scheme,
        expert: Expert,
        scale_dtype: torch.dtype,
        notes: Notes,
    ) -> IntegerTensor:
        """Round on a grid searched with the (smoothed) inputs' mean square as importance."""
        if statistics is None:
            raise NumericalError("smoothquant needs calibration statistics, and this layer has none")
        return round_to_grid(weight, *searched_grid(weight, scheme, scale_dtype, statistics.importance), scheme)
