"""Quantized tensors: integer codes apart from their scales, whatever the format on disk.

Experts that share codes and differ in scales cost little more than one expert, so nothing in MoQE fuses the two.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from moqe.schemes import Scheme


@dataclass(frozen=True)
class IntegerTensor:
    """A weight matrix as integer codes with one scale (and zero point) per group of input channels.

    codes: int8 or uint8, (out, in), within `scheme.levels`.
    scale: (out, groups), float16 or bfloat16 or float32: the type that is stored.
    zero_point: (out, groups), int8 or uint8, or None for symmetric schemes.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    scheme: Scheme

    def dequantize(self) -> Tensor:
        """The weights this tensor stands for: float32, (out, in)."""
        rows, columns = self.codes.shape
        groups = self.scale.shape[1]
        codes = self.codes.to(torch.float32).view(rows, groups, columns // groups)
        if self.zero_point is not None:
            codes = codes - self.zero_point.to(torch.float32)[..., None]
        return (codes * self.scale.to(torch.float32)[..., None]).view(rows, columns)


@dataclass(frozen=True)
class BlockTensor:
    """A weight matrix in one of ggml's block types, its fields unpacked.

    codes: uint8, (out, in): the integers of every weight, before offsets.
    fields: the block's other members by ggml's own names (`d`, `dmin`, `scales`, `mins`, ...), each (out, blocks, ...),
    float16 where the file stores float16 and uint8/int8 where it stores packed integers (here unpacked).
    """

    codes: Tensor
    fields: dict[str, Tensor] = field(default_factory=dict)
    scheme: Scheme = field(kw_only=True)

    def dequantize(self) -> Tensor:
        """The weights this tensor stands for: float32, (out, in), equal bit for bit to ggml's."""
        from moqe.formats.ggml_blocks import dequantize

        return dequantize(self)


Quantized = IntegerTensor | BlockTensor
