"""Stored weights in the one shape all kernels are fed from: signed codes, scales and shifts by group.

    weight = code * scale + shift

Codes lie around zero, so symmetric weights have no shift, and the sum of a group is small before it is scaled. The
identity holds for integer schemes, shift = (centre - zero point) * scale, and for ggml's blocks, whose minima are
shifts already. In float32 it differs from the order in which the formats multiply by rounding only.

Codes are unpacked when they are asked for: experts that share codes in memory never read theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moqe.formats.bit_packing import unpack
from moqe.formats.ggml_blocks import LAYOUTS
from moqe.formats.packed_tensor import PackedTensor
from moqe.quantized import BlockTensor, IntegerTensor

Key = tuple[object, ...]


@dataclass(frozen=True)
class GroupedWeight:
    """A weight matrix, its codes not unpacked yet.

    codes: makes them, int8 (out, in). scale: float32, (out, groups). shift: float32, (out, groups), or None where all
    are zero. shape: (out, in). bits: of a code. activation_bits: of the dynamic quantization of inputs, 16 for none.
    key: equal for weights with the same codes, None where nothing is known about that.
    """

    codes: Callable[[], Tensor]
    scale: Tensor
    shift: Tensor | None
    shape: tuple[int, int]
    bits: int
    activation_bits: int = 16
    key: Key | None = None

    @property
    def groups(self) -> int:
        """How many groups a row has."""
        return self.scale.shape[1]

    @property
    def group_size(self) -> int:
        """Input channels of a group."""
        return self.shape[1] // self.groups

    def dequantize(self) -> Tensor:
        """The weights: float32, (out, in)."""
        codes = self.codes().to(torch.float32).view(self.shape[0], self.groups, -1)
        weight = codes * self.scale[..., None]
        return (weight if self.shift is None else weight + self.shift[..., None]).view(self.shape)

    def in_order(self, rows: Tensor, name: str) -> GroupedWeight:
        """The same with its rows in another order; `name` stands for it in the key."""
        shift = None if self.shift is None else self.shift[rows]
        key = None if self.key is None else (*self.key, name)
        codes, bits = self.codes, self.bits
        return GroupedWeight(
            lambda: codes()[rows], self.scale[rows], shift, self.shape, bits, self.activation_bits, key
        )

    def regrouped(self, size: int) -> GroupedWeight:
        """The same with smaller groups, whose size divides the present one."""
        times = self.group_size // size
        if times == 1:
            return self
        scale = self.scale.repeat_interleave(times, 1)
        shift = None if self.shift is None else self.shift.repeat_interleave(times, 1)
        return GroupedWeight(self.codes, scale, shift, self.shape, self.bits, self.activation_bits, self.key)


def grouped_weight(stored: PackedTensor | IntegerTensor | BlockTensor, key: Key | None = None) -> GroupedWeight:
    """A stored weight; see `GroupedWeight` for `key`."""
    if isinstance(stored, BlockTensor):
        return _of_blocks(stored, key)
    scheme = stored.scheme
    half = 1 << (scheme.weight_bits - 1)
    scale = stored.scale.to(torch.float32)
    zero: Tensor | None  # what the unsigned code of a zero is
    if isinstance(stored, PackedTensor):
        shape, zero = stored.shape, _unsigned_zero(stored, half)
        codes: Callable[[], Tensor] = lambda: _centred(stored, half)  # noqa: E731
    else:
        rows, columns = stored.codes.shape
        shape, unsigned = (rows, columns), scheme.levels[0] == 0
        zero = stored.zero_point
        zero = zero if zero is None or unsigned else zero.to(torch.int16) + half
        lift = half if unsigned else 0
        codes = lambda: (stored.codes.to(torch.int16) - lift).to(torch.int8)  # noqa: E731
        if unsigned and zero is None:
            zero = torch.zeros_like(scale)
    shift = None if zero is None else (half - zero.to(torch.float32)) * scale
    return GroupedWeight(codes, scale, shift, shape, scheme.weight_bits, scheme.activation_bits, key)


def concatenated(weights: Sequence[GroupedWeight]) -> GroupedWeight | None:
    """Linears with the same input as one, rows one after the other; None where their grids are not of one kind."""
    first = weights[0]
    kinds = {(weight.shape[1], weight.groups, weight.bits, weight.activation_bits) for weight in weights}
    if len(kinds) > 1:
        return None
    shift = None
    if any(weight.shift is not None for weight in weights):
        shift = torch.cat([torch.zeros_like(w.scale) if w.shift is None else w.shift for w in weights])
    keys = [weight.key for weight in weights]
    return GroupedWeight(
        lambda: torch.cat([weight.codes() for weight in weights]),
        torch.cat([weight.scale for weight in weights]),
        shift,
        (sum(weight.shape[0] for weight in weights), first.shape[1]),
        first.bits,
        first.activation_bits,
        None if any(key is None for key in keys) else tuple(keys),
    )


def _centred(stored: PackedTensor, half: int) -> Tensor:
    """Signed codes, int8 (out, in). Codes stored as int8 are signed already."""
    if stored.codes.dtype == torch.int8:
        return stored.codes
    return (unpack(stored.codes, stored.scheme.weight_bits, stored.shape[1]) - half).view(torch.int8)


def _unsigned_zero(stored: PackedTensor, half: int) -> Tensor | None:
    zero = stored.zero_point
    if zero is None:
        return None
    if zero.dtype == torch.int32:
        return unpack(zero.T, stored.scheme.weight_bits, stored.shape[0]).T
    return zero.to(torch.int16) + half


def _of_blocks(stored: BlockTensor, key: Key | None) -> GroupedWeight:
    """ggml's blocks: groups are the sub-blocks of 16 or 32 weights."""
    layout, fields, bits = LAYOUTS[stored.scheme.block], stored.fields, stored.scheme.weight_bits
    half = 1 << (bits - 1)
    d = fields["d"].to(torch.float32)[..., None]  # (out, blocks, 1)
    scale = d * fields["scales"].to(torch.float32) if layout.scales else d
    shift = (half - layout.offset) * scale
    if "mins" in fields:
        shift = shift - fields["dmin"].to(torch.float32)[..., None] * fields["mins"].to(torch.float32)
    elif "m" in fields:
        shift = shift + fields["m"].to(torch.float32)[..., None]
    rows, columns = stored.codes.shape
    symmetric = half == layout.offset and not {"mins", "m"} & fields.keys()
    return GroupedWeight(
        lambda: (stored.codes.to(torch.int16) - half).to(torch.int8),
        scale.reshape(rows, -1),
        None if symmetric else shift.reshape(rows, -1),
        (rows, columns),
        bits,
        key=key,
    )
