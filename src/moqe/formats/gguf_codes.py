"""Integer codes with scales by group -> ggml blocks of 32 that stand for the very same weights.

Specification: ggml's block structs, see `ggml_blocks`. A group of 32, 64, 128 or any other multiple of 32 inputs falls
into whole blocks, each with the group's scale `d`, so nothing is quantized anew: w = (code - zero) * scale is
rewritten as an integer times d.

    Q4_0   w = q * d,      q from -8 to 7       3- and 4-bit symmetric codes, 2- and 3-bit asymmetric ones
    Q4_1   w = q * d + m,  q from 0 to 15       4-bit asymmetric codes, m = -zero * scale
    Q5_0   w = q * d,      q from -16 to 15     4-bit asymmetric codes: code - zero takes five bits
    Q8_0   w = q * d,      q from -128 to 127   8-bit symmetric codes

When it is lossless: `d` and `m` are float16. A bfloat16 scale (8 significant bits) between 2^-17 and 65504 is always
one; a smaller scale, or a float32 one, need not be. A block of zeros gets d = 0 whatever its scale was. The product
zero * scale has up to 12 significant bits where float16 has 11, so Q4_1 rarely holds a whole matrix exactly, and the
matrix becomes Q5_0, half a bit a weight larger. Sums and products of so few bits are exact in float32: weights that are
lossless here are equal bit for bit in every program that follows ggml.

With `rounding`, scales and offsets are rounded to float16 (relative error at most 2^-11 unless they are below 2^-14)
and 4-bit asymmetric codes become Q4_1; what was rounded is counted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moqe.quantized import BlockTensor, IntegerTensor
from moqe.schemes import SCHEMES

BLOCK = 32
_RANGES = {"q4_0": 8, "q5_0": 16, "q8_0": 128}  # by block scheme what is added to a signed integer to store it


@dataclass(frozen=True)
class Conversion:
    """A matrix as ggml blocks.

    rounded: how many scales and offsets of its blocks float16 does not hold. largest_error: the largest difference of a
    weight from what it was, as a fraction of the largest weight of the matrix; 0 where nothing was rounded.
    """

    tensor: BlockTensor
    rounded: int
    largest_error: float


def to_blocks(tensor: IntegerTensor, *, rounding: bool = False) -> Conversion:
    """The smallest block type that holds an integer tensor exactly, or nearly where `rounding` allows it.

    Raises ValueError, saying what does not fit, when rows or groups are no multiples of 32 inputs, when codes minus
    zero points take more than eight bits, when a scale exceeds what float16 can hold, and, without `rounding`, when
    no block type holds the scales exactly.
    """
    rows, columns = tensor.codes.shape
    group = columns // tensor.scale.shape[1]
    if columns % BLOCK or group % BLOCK:
        raise ValueError(f"rows of {columns} inputs in groups of {group} do not fall into blocks of {BLOCK}")
    signed = tensor.codes.to(torch.int16)
    zero: Tensor | int = 0
    if tensor.zero_point is not None:
        zero = tensor.zero_point.to(torch.int16).repeat_interleave(group, 1)
    elif tensor.scheme.levels[0] == 0:
        raise ValueError("unsigned codes came without zero points")
    signed = signed - zero
    blocks = signed.view(rows, -1, BLOCK)
    used = blocks.ne(0).any(-1)  # (rows, blocks)
    scale = torch.where(used, tensor.scale.to(torch.float32).repeat_interleave(group // BLOCK, 1), 0.0)
    d = scale.to(torch.float16)
    if not torch.isfinite(d).all():
        raise ValueError(f"the scale {float(scale.abs().max()):g} exceeds float16, which is what blocks store")
    inexact = int((d.to(torch.float32) != scale).sum())
    if inexact and not rounding:
        share = inexact / int(used.sum())
        raise ValueError(f"{share:.2%} of its scales are no float16 numbers, so blocks would hold other weights")
    low, high = int(signed.min()), int(signed.max())
    name = next((name for name, half in _RANGES.items() if -half <= low and high < half), "")
    if not name:
        raise ValueError(f"codes minus zero points go from {low} to {high}, and no block type has more than 8 bits")
    offsets = None
    if name == "q5_0" and tensor.zero_point is not None and tensor.scheme.weight_bits <= 4:
        offsets = _offsets(tensor, d, rounding)
    if offsets is None:
        codes = (signed + _RANGES[name]).to(torch.uint8)
        return _conversion(tensor, BlockTensor(codes, {"d": d}, scheme=SCHEMES[name]), inexact)
    m, rounded = offsets
    blocks_41 = BlockTensor(tensor.codes.to(torch.uint8), {"d": d, "m": m}, scheme=SCHEMES["q4_1"])
    return _conversion(tensor, blocks_41, inexact + rounded)


def _offsets(tensor: IntegerTensor, d: Tensor, rounding: bool) -> tuple[Tensor, int] | None:
    """The blocks' `m` as float16, (rows, blocks), and how many were rounded; None where that is not allowed."""
    assert tensor.zero_point is not None
    zero = tensor.zero_point.to(torch.float32).repeat_interleave(d.shape[1] // tensor.scale.shape[1], 1)
    exact = -zero * d.to(torch.float32)
    m = exact.to(torch.float16)
    rounded = int((m.to(torch.float32) != exact).sum())
    if not torch.isfinite(m).all() or (rounded and not rounding):
        return None
    return m, rounded


def _conversion(tensor: IntegerTensor, blocks: BlockTensor, rounded: int) -> Conversion:
    if not rounded:
        return Conversion(blocks, 0, 0.0)
    before = tensor.dequantize()
    error = (blocks.dequantize() - before).abs().max() / before.abs().max()
    return Conversion(blocks, rounded, float(error))
