"""The seam between quantization methods and everything around them.

A method turns a weight matrix and the statistics of its input into codes and scales. It knows nothing of models, files
or recipes beyond its own options, and every output channel is treated alone: quantizing the stacked rows of several
linears that share an input equals quantizing them one by one, so a block's query, key and value are done at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from moqe.methods.statistics import InputStatistics
from moqe.quantized import Quantized
from moqe.recipe import Expert
from moqe.schemes import Scheme

Notes = dict[str, float]


class Method(Protocol):
    """An algorithm that makes quantized weights. Stateless; one instance serves all layers of all experts."""

    name: str
    calibrated: bool  # True where `quantize` or `smooth` needs statistics

    def supports(self, scheme: Scheme) -> str:
        """Empty if the method makes this scheme, else one sentence: why not, and what to write instead."""

    def smooth(
        self,
        weights: Sequence[Tensor],
        statistics: InputStatistics,
        scheme: Scheme,
        expert: Expert,
        reduce: Callable[[Tensor], Tensor],
        notes: Notes,
    ) -> Tensor | None:
        """The scale s, float32 (in,), that makes a group of linears easier to quantize as W * s on inputs x / s.

        weights: the linears that share the input, each float32 (out, in). reduce: maps any positive scale to the
        nearest one that can be folded into what produces x (the identity unless heads share channels); the result has
        been through it. notes: filled in with what the certificate should say. None where the method changes nothing.
        """

    def quantize(
        self,
        weight: Tensor,
        statistics: InputStatistics | None,
        scheme: Scheme,
        expert: Expert,
        scale_dtype: torch.dtype,
        notes: Notes,
    ) -> Quantized:
        """Quantize a weight, float32 (out, in), whose input has these statistics.

        scale_dtype: the type integer schemes store their scales in (ggml's blocks have their own). notes: filled in
        with what the certificate should say, such as the damping that was needed.
        Raises UnsupportedLayer where the shape does not fit the scheme, NumericalError where numbers are not finite.
        """
