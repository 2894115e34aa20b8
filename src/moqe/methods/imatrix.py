"""imatrix: plain rounding onto grids weighted by an importance matrix; ggml's block types, and integer schemes.

Source: llama.cpp's importance matrix (github.com/ggml-org/llama.cpp pull request 4861): the mean of x^2 per input
channel over calibration text, which is the diagonal of GPTQ's H over the number of tokens. Faithful: the files and the
statistic. Differs: the search is our own (see `kquants.py`) and minimises `sum importance * error^2` itself, the
expected squared error of the layer's output if input channels were uncorrelated; llama.cpp multiplies the importance
by the weight's size. q8_0 is searched with weights too, where llama.cpp ignores them; weight-only integer schemes get
the same weighting (`grids.searched_grid`), which llama.cpp does not have.
Cost: see `ggml_rounding.py` and `grids.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from moqe.errors import NumericalError, UnsupportedLayer
from moqe.methods.ggml_rounding import round_to_blocks
from moqe.methods.grids import round_to_grid, searched_grid
from moqe.methods.method import Notes
from moqe.methods.statistics import InputStatistics
from moqe.quantized import Quantized
from moqe.recipe import Expert
from moqe.schemes import Scheme

_LEAST_IMPORTANCE = 1e-9  # relative to the mean: a channel that never fires still has a best rounding


def imatrix(weight: Tensor, importance: Tensor, scheme: Scheme, scale_dtype: torch.dtype = torch.bfloat16) -> Quantized:
    """Round a weight, float32 (out, in), minimising `sum importance * error^2`.

    importance: (in,), not negative, of any scale. scale_dtype: of integer schemes' scales; blocks have their own.
    Raises UnsupportedLayer when the rows do not fit the scheme or the importance is zero everywhere; NumericalError
    when numbers are not finite or too large for float16 scales.
    """
    importance = importance.to(torch.float32)
    if not torch.isfinite(importance).all() or bool((importance < 0).any()):
        raise NumericalError("the importance is negative or not finite: the base model's activations overflow")
    mean = importance.double().mean()
    if float(mean) == 0.0:
        raise UnsupportedLayer("all its calibration inputs are zero: add calibration data that reaches it")
    relative = (importance / mean).to(torch.float32).clamp(min=_LEAST_IMPORTANCE)
    if scheme.is_block:
        return round_to_blocks(weight, relative, scheme)
    return round_to_grid(weight, *searched_grid(weight, scheme, scale_dtype, relative), scheme)


class Imatrix:
    """Rounding onto grids weighted by mean x^2."""

    name = "imatrix"
    calibrated = True

    def supports(self, scheme: Scheme) -> str:
        """Every block scheme and every weight-only integer scheme."""
        if scheme.activation_bits < 16:
            return f"use method: smoothquant for {scheme.name}, or a weight-only scheme such as w4a16"
        return ""

    def smooth(
        self,
        weights: Sequence[Tensor],
        statistics: InputStatistics,
        scheme: Scheme,
        expert: Expert,
        reduce: Callable[[Tensor], Tensor],
        notes: Notes,
    ) -> None:
        """Nothing is moved between inputs and weights."""

    def quantize(
        self,
        weight: Tensor,
        statistics: InputStatistics | None,
        scheme: Scheme,
        expert: Expert,
        scale_dtype: torch.dtype,
        notes: Notes,
    ) -> Quantized:
        """See `imatrix`."""
        if statistics is None or statistics.tokens <= 0:
            raise UnsupportedLayer(
                "imatrix needs calibration inputs and none reached this layer: add calibration data that does, or use "
                "method: kquants"
            )
        return imatrix(weight, statistics.importance, scheme, scale_dtype)
