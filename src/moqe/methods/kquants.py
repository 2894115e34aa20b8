"""kquants: ggml's block types without calibration data.

Source: the block types of llama.cpp (K-quants: github.com/ggml-org/llama.cpp pull request 1684), whose layouts are in
`formats/ggml_blocks.py`. Faithful: the files, and that without data a weight's error counts by the weight's own size,
as in llama.cpp's q4_k and q5_k. Differs: the search (`ggml_search.py`, `ggml_superblocks.py`) is our own; the same rule
of weighting serves all K-quants, where llama.cpp has one for each type; q4_0, q4_1, q5_0 and q8_0 are searched too,
where llama.cpp rounds between the extremes.
Cost: see `ggml_rounding.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from moqe.methods.ggml_rounding import GRIDS, round_to_blocks
from moqe.methods.method import Notes
from moqe.methods.statistics import InputStatistics
from moqe.quantized import BlockTensor
from moqe.recipe import Expert
from moqe.schemes import Scheme

_SUPER_BLOCK = 256
_EVENNESS = {"q6_k": 2.0}  # at six bits large weights are so close already that they need less of a guard


def kquants(weight: Tensor, scheme: Scheme) -> BlockTensor:
    """Round a weight, float32 (out, in), to a block type without data.

    The error counts by `magnitude_weighting` for K-quants and evenly for the types without super-blocks.
    Raises UnsupportedLayer when rows are not made of whole blocks, NumericalError when numbers are not finite or too
    large for float16 scales.
    """
    whole = weight.shape[1] % _SUPER_BLOCK == 0
    weighting = None
    if scheme.block_size == _SUPER_BLOCK and whole:
        weighting = magnitude_weighting(weight, _EVENNESS.get(scheme.name, 1.0))
    return round_to_blocks(weight, weighting, scheme)


def magnitude_weighting(weight: Tensor, evenness: float) -> Tensor:
    """How much each weight's error counts: evenness * r + |w|, with r the root mean square of its run of 32; (out, in).

    Divided by the root mean square of each run of 256, so that it is around one. In trained models large weights tend
    to matter more: |w| guards them, r treats all alike.
    """
    runs = weight.reshape(weight.shape[0], -1, _SUPER_BLOCK // 32, 32)
    power = runs.square().mean(-1, keepdim=True)
    norm = power.mean(-2, keepdim=True).sqrt()
    norm = torch.where(norm > 0, norm, 1.0)
    weighting = (evenness * power.sqrt() + runs.abs()) / norm
    return torch.where(power > 0, weighting, 1.0).reshape(weight.shape)


class KQuants:
    """ggml's block types, uncalibrated."""

    name = "kquants"
    calibrated = False

    def supports(self, scheme: Scheme) -> str:
        """Every block scheme."""
        return "" if scheme.name in GRIDS else f"use a block scheme such as q4_k, or method: rtn for {scheme.name}"

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
        """See `kquants`. Block types have their own scales, in float16 whatever `scale_dtype` is."""
        return kquants(weight, scheme)
