"""Codes with scales by group, multiplied in float32 without being unpacked: a product as a sum of embeddings.

A weight whose inputs are its rows is a table of low-bit embeddings, and y = sum_k x_k W_k is a bag of all of them with
weights x. PyTorch ships such bags for 4 and 8 bits, vectorised and summed in float32. With one bag per group of inputs
the sums of a group come before its scale:

    y = sum_g scale_g * bag_g(x) + shift_g * sum(x in g)

Every row of inputs reads the whole table, so it is the way for few rows. For many, the weight is unpacked and
multiplied as usual.

Layout: a row for every input channel, its codes plus half the range and then its scale and bias, which are one and
minus half of the range; 4-bit codes are two to a byte, low one first. Scale and bias are float16 at 4 bits, float32 at
8.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from moqe.errors import ModelError
from moqe.runtimes.packed.kernel import Multiply
from moqe.runtimes.packed.weight import GroupedWeight

_FEW = 8
_ELEMENTS = 1 << 19  # weights unpacked at once


class BagKernels:
    """A weight as low-bit embeddings. Satisfies `Kernels`.

    table: what `bag_table` made. weight: scales and shifts. precision: float32, or bfloat16 for the product of many
    rows. Runs on the CPU.
    """

    def __init__(self, table: Tensor, weight: GroupedWeight, precision: torch.dtype) -> None:
        self.shape, self.precision = weight.shape, precision
        self._table, self._wide = table, weight.bits > 4
        self._scale = weight.scale.T.contiguous()  # (groups, out)
        self._shift = None if weight.shift is None else weight.shift.T.contiguous()
        self._group_size = weight.group_size
        columns = self.shape[1]
        self._indices = torch.arange(columns, dtype=torch.int32)
        self._offsets = torch.arange(0, columns, self._group_size, dtype=torch.int32)
        self.kind = f"bags {8 if self._wide else 4} bits, {self._group_size} {precision}"

    def candidates(self, rows: int) -> Mapping[str, Multiply]:
        """Bags for few rows; unpacking for all, in bfloat16 with either product."""
        found: dict[str, Multiply] = {"unpacked": self.unpacked}
        if self.precision != torch.float32:
            found["unpacked, float32"] = self.widened
        return {"bags": self.bags, **found} if rows <= _FEW else found

    def tensors(self) -> tuple[Tensor, ...]:
        """The table, scales and shifts."""
        return (self._table, self._scale, *(() if self._shift is None else (self._shift,)))

    def bags(self, x: Tensor) -> Tensor:
        """Sums by group straight from the codes: float32."""
        x = x.to(torch.float32)
        rows, groups = x.shape[0], self._scale.shape[0]
        indices, offsets = self._indices, self._offsets
        if rows > 1:
            starts = torch.arange(rows, dtype=torch.int32)[:, None] * self.shape[1]
            indices, offsets = indices.repeat(rows), (offsets + starts).flatten()
        bag = torch.ops.quantized.embedding_bag_4bit_rowwise_offsets
        if self._wide:
            bag = torch.ops.quantized.embedding_bag_byte_rowwise_offsets
        sums = bag(self._table, indices, offsets, False, 0, False, x.flatten(), None, False)
        product: Tensor = sums.view(rows, groups, -1).mul_(self._scale).sum(1)
        return product if self._shift is None else product.addmm_(x.view(rows, groups, -1).sum(-1), self._shift)

    def unpacked(self, x: Tensor) -> Tensor:
        """The product with weights unpacked for the occasion: of type `precision`."""
        return x.to(self.precision) @ self._weight(self.precision)

    def widened(self, x: Tensor) -> Tensor:
        """The same in float32, which is faster where a processor has no instructions for bfloat16."""
        return x.to(torch.float32) @ self._weight(torch.float32)

    def _weight(self, dtype: torch.dtype) -> Tensor:
        """All weights, (in, out)."""
        outputs, inputs = self.shape
        weight = torch.empty(inputs, outputs, dtype=dtype)
        step = max(1, _ELEMENTS // (outputs * self._group_size)) * self._group_size
        for start in range(0, inputs, step):
            part = slice(start, min(inputs, start + step))
            weight[part] = self._unpack(part)
        return weight

    def _unpack(self, part: slice) -> Tensor:
        """Weights of some whole groups of input channels: float32, (in, out)."""
        outputs = self.shape[0]
        groups = slice(part.start // self._group_size, part.stop // self._group_size)
        table, count = self._table[part], part.stop - part.start
        codes = torch.empty(count, outputs)
        if self._wide:
            codes.copy_(table[:, :outputs]).sub_(128)
        else:
            pairs = table[:, : outputs // 2].to(torch.int16)
            pairs = (pairs & 15) | (pairs & 240) << 4  # each nibble in a byte of its own, low one first
            codes.copy_(pairs.view(torch.uint8)).sub_(8)
        weights = codes.view(-1, self._group_size, outputs).mul_(self._scale[groups, None])
        if self._shift is not None:
            weights.add_(self._shift[groups, None])
        return weights.view(count, outputs)


def bag_table(codes: Tensor, bits: int) -> Tensor:
    """Signed codes of at most 8 bits, int8 (out, in), as rows of embeddings: uint8, (in, bytes).

    Raises ModelError for an odd number of outputs at 4 bits and below, which share bytes.
    """
    outputs, inputs = codes.shape
    if bits > 4:
        values = codes.T.to(torch.int16).add_(128).to(torch.uint8)
        ends = torch.tensor([1.0, -128.0], dtype=torch.float32).view(torch.uint8)
        return torch.cat([values, ends.expand(inputs, -1)], 1).contiguous()
    if outputs % 2:
        raise ModelError(f"a layer of {outputs} outputs cannot be packed two to a byte: use the reference runtime")
    values = codes.T.to(torch.int16).add_(8).to(torch.uint8)
    values = values[:, ::2] | values[:, 1::2] << 4
    ends = torch.tensor([1.0, -8.0], dtype=torch.float16).view(torch.uint8)
    return torch.cat([values, ends.expand(inputs, -1)], 1).contiguous()
