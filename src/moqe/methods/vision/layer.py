"""A quantized layer of an image classifier: integer weight codes, their scales, and how its input becomes integers.

This is what every vision method returns, what an ONNX expert holds, and what the reference runtime computes with. All
numbers are exact in float32, so a file and the network that was measured agree to the last bit.

Three kinds of input quantizers exist, each a function x -> x_hat in float32:

Uniform     evenly spaced levels with a zero point: ptq, qat, brecq
Thresholds  learned thresholds, evenly spaced levels behind them: n2uq
BlockFloat  groups of channels share a power of two: dsconv
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FINE_LEVELS = 1 << 16  # of the grid that thresholds lie on
SMALLEST_EXPONENT = -100  # of a block: below, float32's subnormal numbers would make steps inexact


def float32(value: float) -> float:
    """The nearest float32 number: scales must be such, since files store them so."""
    return float(torch.tensor(value, dtype=torch.float32))


def unsigned_range(bits: int) -> tuple[int, int]:
    """Smallest and largest unsigned code."""
    return 0, (1 << bits) - 1


def signed_range(bits: int) -> tuple[int, int]:
    """Smallest and largest signed code."""
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


@dataclass(frozen=True)
class WeightCodes:
    """A weight as signed integer codes and scales.

    codes: int8, the weight's own shape: (out, in / groups, kh, kw) or (out, in), within `signed_range(bits)`.
    scale: float32. With `block` 0 one per output channel: (out,). Else one for every `block` consecutive input
    channels at each kernel position: (out, ceil(in / block), kh, kw), or (out, ceil(in / block)) for a linear; the
    last block may be shorter.
    """

    codes: Tensor
    scale: Tensor
    block: int
    bits: int

    def dequantize(self) -> Tensor:
        """The weight these codes stand for: float32, the weight's own shape."""
        codes = self.codes.to(torch.float32)
        if not self.block:
            return codes * self.scale.view(-1, *[1] * (codes.ndim - 1))
        return codes * self.scale.repeat_interleave(self.block, dim=1)[:, : codes.shape[1]]


@dataclass(frozen=True)
class Uniform:
    """Evenly spaced levels: x_hat = (clamp(round(x / scale) + zero_point, lowest, highest) - zero_point) * scale.

    Halves round to even, as in ONNX's QuantizeLinear. The codes are signed or unsigned integers of `bits` bits.
    """

    scale: float
    zero_point: int
    bits: int
    signed: bool = False

    @property
    def levels(self) -> tuple[int, int]:
        """Smallest and largest code."""
        return signed_range(self.bits) if self.signed else unsigned_range(self.bits)

    def __call__(self, x: Tensor) -> Tensor:
        """The nearest level of each element of x, float32 of any shape."""
        scale = x.new_tensor(self.scale)  # a tensor: dividing by a number may become multiplying by its reciprocal
        codes = (x / scale).round_().add_(self.zero_point).clamp_(*self.levels)
        return codes.sub_(self.zero_point).mul_(scale)


@dataclass(frozen=True)
class Thresholds:
    """Learned thresholds, evenly spaced levels: x_hat = (table[fine(x)] - zero_point) * scale.

    fine(x) = clamp(round(x / fine_scale) + fine_zero_point, 0, 65535) puts x on a 16-bit grid first, so that a table
    holds the whole function exactly. table: uint8, (65536,), the level of each fine code, never falling, below
    2 ** bits. zero_point: the level that stands for zero, 0 where inputs are not negative.
    """

    table: Tensor
    fine_scale: float
    fine_zero_point: int
    scale: float
    bits: int
    zero_point: int = 0

    def fine(self, x: Tensor) -> Tensor:
        """The fine code of each element: int64, the shape of x."""
        codes = (x / x.new_tensor(self.fine_scale)).round_().add_(self.fine_zero_point)
        return codes.clamp_(0, FINE_LEVELS - 1).to(torch.int64)

    def __call__(self, x: Tensor) -> Tensor:
        """The level behind each element's threshold, for x float32 of any shape."""
        levels = self.table.to(x.device)[self.fine(x)].to(torch.float32)
        return levels.sub_(self.zero_point).mul_(x.new_tensor(self.scale))


@dataclass(frozen=True)
class BlockFloat:
    """Block floating point: `block` consecutive channels at one position share the exponent of their largest magnitude.

    With 2 ** e <= largest < 2 ** (e + 1), elements become multiples of 2 ** (e + 1 - n), n the mantissa bits without
    sign: round(x / step), halves to even, cut at 2 ** n - 1 (and -2 ** n if signed; the sign is one of the
    `mantissa_bits`). e is at least -100. axis: where channels are, 1 for convolutions and -1 for linears.
    """

    mantissa_bits: int
    block: int
    signed: bool
    axis: int

    @property
    def bits(self) -> int:
        """Bits of one mantissa."""
        return self.mantissa_bits

    def __call__(self, x: Tensor) -> Tensor:
        """Each element on the grid of its block, for x float32 with channels along `axis`."""
        magnitude_bits = self.mantissa_bits - 1 if self.signed else self.mantissa_bits
        highest = (1 << magnitude_bits) - 1
        lowest = -(1 << magnitude_bits) if self.signed else 0
        channels = x.shape[self.axis]
        blocks = torch.split(x, self.block, dim=self.axis) if self.block < channels else (x,)
        parts = []
        for part in blocks:
            largest = part.abs().amax(self.axis, keepdim=True).clamp_(min=2.0**SMALLEST_EXPONENT)
            mantissa, _ = torch.frexp(largest)  # in [0.5, 1)
            step = largest.div_(mantissa).mul_(2.0**-magnitude_bits)  # the quotient is 2 ** (e + 1), exactly
            parts.append((part / step).round_().clamp_(lowest, highest).mul_(step))
        return torch.cat(parts, self.axis) if len(parts) > 1 else parts[0]


InputQuantizer = Uniform | Thresholds | BlockFloat


@dataclass(frozen=True)
class QuantizedLayer:
    """A convolution or linear as it is executed: quantize the input, multiply, add the bias, quantize the output.

    name: of the module in the folded network. bias: float32, (out,), or None. input: None leaves the input in float.
    output: set where an 8-bit layer feeds something that would otherwise leave integers, such as an addition.
    Layers that a method keeps in full precision are not listed at all.
    """

    name: str
    weight: WeightCodes
    bias: Tensor | None
    input: InputQuantizer | None
    output: Uniform | None = None
