"""imatrix: ggml's block types, weighted by an importance matrix.

Source: llama.cpp's importance matrix (github.com/ggml-org/llama.cpp pull request 4861): the mean of x^2 per input
channel over calibration text, which is the diagonal of GPTQ's H over the number of tokens. Faithful: the files and the
statistic. Differs: the search is our own (see `kquants.py`) and minimises `sum importance * error^2` itself, the
expected squared error of the layer's output if input channels were uncorrelated; llama.cpp multiplies the importance
by the weight's size. q8_0 is searched with weights too, where llama.cpp ignores them.
Cost: see `ggml_rounding.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from moqe.errors import NumericalError, UnsupportedLayer
from moqe.methods.ggml_rounding import GRIDS, round_to_blocks
from moqe.methods.method import Notes
from moqe.methods.statistics import InputStatistics
from moqe.quantized import BlockTensor
from moqe.recipe import Expert
from moqe.schemes import Scheme

_LEAST_IMPORTANCE = 1e-9  # relative to the mean: a channel that never fires still has a best rounding


def imatrix(weight: Tensor, importance: Tensor, scheme: Scheme) -> BlockTensor:
    """Round a weight, float32 (out, in), to a block type, minimising `sum importance * error^2`.

    importance: (in,), not negative, of any scale.
    Raises UnsupportedLayer when rows are not made of whole blocks or the importance is zero everywhere; NumericalError
    when numbers are not finite or too large for float16 scales.
    """
    importance = importance.to(torch.float32)
    if not torch.isfinite(importance).all() or bool((importance < 0).any()):
        raise NumericalError("the importance is negative or not finite: the base model's activations overflow")
    mean = importance.double().mean()
    if float(mean) == 0.0:
        raise UnsupportedLayer("all its calibration inputs are zero: add calibration data that reaches it")
    relative = (importance / mean).to(torch.float32).clamp(min=_LEAST_IMPORTANCE)
    return round_to_blocks(weight, relative, scheme)


class Imatrix:
    """ggml's block types, calibrated."""

    name = "imatrix"
    calibrated = True

    def supports(self, scheme: Scheme) -> str:
        """Every block scheme."""
        return "" if scheme.name in GRIDS else f"use a block scheme such as q4_k, or method: gptq for {scheme.name}"

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
    ) -> BlockTensor:
        """See `imatrix`. Block types have their own scales, in float16 whatever `scale_dtype` is."""
        if statistics is None or statistics.tokens <= 0:
            raise UnsupportedLayer(
                "imatrix needs calibration inputs and none reached this layer: add calibration data that does, or use "
                "method: kquants"
            )
        return imatrix(weight, statistics.importance, scheme)
