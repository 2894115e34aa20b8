"""8-bit codes with one scale per output channel, on integer products.

`torch._int_mm` multiplies int8 by int8 into int32, exactly. For w8a8 that is the layer's own arithmetic. For w8a16 the
input is written in digits: x = s (q1 + q2 / 254 + q3 / 254^2 + ...), every q an int8, the digits of a token as rows
of one product. Two digits hold 16 bits of the token's largest value, twice what bfloat16 holds; three hold as many as
float32, and the weight is still read once. The same sums are the product of the weight with inputs as columns,
W x^T, which is faster for a few inputs; for more, turning the result costs what that saves. Where few rows are
multiplied and results in bfloat16 are enough, `_weight_int8pack_mm` is another way.

Codes of fewer bits or wider groups of the same kind run here too; they take a byte in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from moqe.runtimes.packed.kernel import Multiply
from moqe.runtimes.packed.weight import GroupedWeight

_DIGITS = {torch.float32: 3, torch.bfloat16: 2}
_BASE = 254.0  # two neighbouring digits: a remainder of half a step is 127 steps of the next one
_FEW = 16  # rows up to which a kernel for vectors, or inputs as columns, is worth a trial
_ELEMENTS = 1 << 19  # results computed at once
_TINY = torch.finfo(torch.float32).tiny  # the scale of a token that is all zeros
_GPU_ROWS = 17  # the fewest that the integer product of CUDA takes


class ByteKernels:
    """An int8 weight. Satisfies `Kernels`.

    codes: int8, (out, in). weight: its scales and shifts, one a row. precision: float32 or bfloat16, of inputs that
    stay in floating point.
    """

    def __init__(self, codes: Tensor, weight: GroupedWeight, precision: torch.dtype) -> None:
        self.shape, self.precision = weight.shape, precision
        self._codes, self._transposed = codes, codes.t()
        self._scale = weight.scale[:, 0].contiguous()
        self._shift = None if weight.shift is None else weight.shift[:, 0].contiguous()
        self._few_scale = self._scale.to(torch.bfloat16)
        self.activation_bits = weight.activation_bits
        self.kind = f"bytes a{self.activation_bits} {precision}"

    def candidates(self, rows: int) -> Mapping[str, Multiply]:
        """Integers, rounded to or in digits; of few rows with the weight on the left too, and by a kernel for them."""
        name, multiply = ("digits", self.digits) if self.activation_bits == 16 else ("integers", self.integers)
        found: dict[str, Multiply] = {name: multiply}
        if rows <= _FEW and self._codes.device.type == "cpu":
            found[f"{name} as columns"] = partial(multiply, columns=True)
            if self.precision == torch.bfloat16:
                found["vectors"] = self.vectors
        return found

    def tensors(self) -> tuple[Tensor, ...]:
        """Codes, scales and shifts."""
        shift = () if self._shift is None else (self._shift,)
        return (self._codes, self._scale, self._few_scale, *shift)

    def integers(self, x: Tensor, columns: bool = False) -> Tensor:
        """Inputs rounded per token as `quantize_activations` does, then multiplied as integers: float32."""
        return self._in_parts(partial(self._integers, columns=columns), x)

    def digits(self, x: Tensor, columns: bool = False) -> Tensor:
        """Inputs as digits, a row each: float32."""
        return self._in_parts(partial(self._digits, columns=columns), x)

    def vectors(self, x: Tensor) -> Tensor:
        """By a kernel that reads the weight for every row; rounded inputs are exact in bfloat16: any float type."""
        scale = None
        if self.activation_bits < 16:
            x, scale = self._rounded(x)
        product = torch._weight_int8pack_mm(x.to(torch.bfloat16), self._codes, self._few_scale)
        if self._shift is not None:
            product = torch.addmm(product.to(torch.float32), x.to(torch.float32).sum(-1, True), self._shift[None])
        return product if scale is None else product * scale

    def _in_parts(self, multiply: Multiply, x: Tensor) -> Tensor:
        """Rows a few at a time, so that what comes between codes and results stays in the processor's cache."""
        step = max(1, _ELEMENTS // self.shape[0])
        if len(x) <= step:
            return multiply(x)
        product = torch.empty(len(x), self.shape[0], device=x.device)
        for start in range(0, len(x), step):
            product[start : start + step] = multiply(x[start : start + step])
        return product

    def _rounded(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Codes of inputs, whole numbers in float32, (rows, in), and what one is worth, (rows, 1)."""
        x = x.to(torch.float32)
        half = float(1 << (self.activation_bits - 1))
        scale = x.abs().amax(-1, True).div_(half - 0.5).clamp_min_(_TINY)
        return (x / scale).clamp_max_(half - 1).round_(), scale  # the lowest one rounds to -half by itself

    def _integers(self, x: Tensor, columns: bool) -> Tensor:
        codes, scale = self._rounded(x)
        product = self._product(codes.to(torch.int8), columns).mul_(scale).mul_(self._scale)
        return product if self._shift is None else product.addmm_(codes.sum(-1, True) * scale, self._shift[None])

    def _digits(self, x: Tensor, columns: bool) -> Tensor:
        x = x.to(torch.float32)
        rows, count = x.shape[0], _DIGITS[self.precision]
        scale = x.abs().amax(-1, True).div_(127.0).clamp_min_(_TINY)
        codes = torch.empty(count, *x.shape, dtype=torch.int8, device=x.device)
        rest = x / scale
        for digit in range(count):
            whole = rest.round()
            codes[digit] = whole
            if digit + 1 < count:
                rest = rest.sub_(whole).mul_(_BASE)
        parts = self._product(codes.view(count * rows, -1), columns).view(count, rows, -1)
        product = parts[count - 1]
        for digit in range(count - 2, -1, -1):
            product = torch.add(parts[digit], product, alpha=1 / _BASE)
        product = product.mul_(scale).mul_(self._scale)
        return product if self._shift is None else product.addmm_(x.sum(-1, True), self._shift[None])

    def _product(self, codes: Tensor, columns: bool) -> Tensor:
        """int8, (rows, in), times the weight: whole numbers in float32, (rows, out)."""
        if columns:
            sums = torch._int_mm(self._codes, codes.t())  # (out, rows)
            return sums.t().to(torch.float32, memory_format=torch.contiguous_format)
        lacking = _GPU_ROWS - codes.shape[0] if codes.device.type == "cuda" else 0
        if lacking <= 0:
            return torch._int_mm(codes, self._transposed).to(torch.float32)
        padded = torch.cat([codes, codes.new_zeros(lacking, codes.shape[1])])
        return torch._int_mm(padded, self._transposed)[: codes.shape[0]].to(torch.float32)
