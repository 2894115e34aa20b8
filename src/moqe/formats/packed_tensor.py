"""A weight matrix whose integer codes stay as compressed-tensors stores them, dequantized when it is needed.

Format: see `compressed_tensors`. The arithmetic is `IntegerTensor.dequantize`'s, so the weights are equal bit for bit.

Cost: a byte or less a weight while it is kept. Dequantizing makes the float32 matrix a few rows at a time, so that what
comes between codes and weights stays in the processor's cache. On a CPU with AVX-512 that takes as long as multiplying
70 to 80 vectors by the matrix at 4 bits, 170 at 3 bits, 30 to 50 where a code is a byte.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moqe.formats.bit_packing import packed_words, unpack
from moqe.schemes import Scheme

_ELEMENTS = 1 << 18  # weights dequantized at once: 1 MiB of float32


@dataclass(frozen=True)
class PackedTensor:
    """Stored codes with their grid.

    codes: int32, (out, words), unsigned codes in a bit stream along the inputs; or int8, (out, in), signed.
    scale: (out, groups), float16, bfloat16 or float32.
    zero_point: int32, (words, groups), packed along the outputs; or int8, (out, groups), signed; None if symmetric.
    shape: (out, in). Raises ValueError where the parts do not belong together.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    shape: tuple[int, int]
    scheme: Scheme

    def __post_init__(self) -> None:
        if self.codes.dtype not in (torch.int32, torch.int8):
            raise ValueError(f"codes of type {self.codes.dtype} instead of int8 or packed int32")
        rows, columns = self.shape
        groups = self.scale.shape[1]
        bits = self.scheme.weight_bits
        width = packed_words(columns, bits) if self.codes.dtype == torch.int32 else columns
        parts = {"codes": (self.codes, (rows, width)), "scales": (self.scale, (rows, groups))}
        if self.zero_point is not None:
            length = packed_words(rows, bits) if self.zero_point.dtype == torch.int32 else rows
            parts["zero points"] = (self.zero_point, (length, groups))
        for what, (part, expected) in parts.items():
            if tuple(part.shape) != expected:
                raise ValueError(f"{what} of shape {tuple(part.shape)} instead of {expected}")
        if columns % groups:
            raise ValueError(f"{columns} inputs do not fall into {groups} equal groups")

    def dequantize(self) -> Tensor:
        """The weights this tensor stands for: float32, (out, in)."""
        rows, columns = self.shape
        groups = self.scale.shape[1]
        scale, zero = self.scale.to(torch.float32)[..., None], self._zero()
        weight = torch.empty(rows, groups, columns // groups, device=self.codes.device)
        step = max(1, _ELEMENTS // columns)
        for start in range(0, rows, step):
            part = slice(start, start + step)
            codes = self.codes[part]
            if codes.dtype == torch.int32:
                codes = unpack(codes, self.scheme.weight_bits, columns)
            weights = weight[part].copy_(codes.view(-1, groups, columns // groups))
            if isinstance(zero, Tensor):
                weights.sub_(zero[part])
            elif zero:
                weights.sub_(zero)
            weights.mul_(scale[part])
        return weight.view(rows, columns)

    def _zero(self) -> Tensor | int:
        """What is taken from the codes: float32, (out, groups, 1), or one number for all."""
        bits, half = self.scheme.weight_bits, 1 << (self.scheme.weight_bits - 1)
        lowest = 0 if self.codes.dtype == torch.int32 else -half
        if self.zero_point is None:
            return half + lowest
        if self.zero_point.dtype == torch.int32:
            return unpack(self.zero_point.T, bits, self.shape[0]).T.to(torch.float32)[..., None] + lowest
        return self.zero_point.to(torch.float32)[..., None] + (half + lowest)
