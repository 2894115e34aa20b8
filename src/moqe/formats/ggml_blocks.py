"""ggml's block types: bytes <-> fields <-> weights.

Specification: the block structs of ggml (`block_q4_K` and its siblings), as GGUF files store them.
A row of weights is a run of blocks of 32 or 256; a block is a few members of fixed size, one after the other. Members
are float16 scales, small integer scales packed into bytes, and the codes. Codes wider than a power of two are kept in
two members: low bits and high bits.

Every packed member follows one rule, `split_planes`: bytes come in groups of `width`, and all the lowest bits of a
group's bytes come before the next higher ones. The exceptions are the 6-bit scales, which have two functions of their
own.

`dequantize` multiplies and subtracts in ggml's order, in float32, without fused operations: results equal the `gguf`
package's bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moqe.errors import CheckpointError, RecipeError
from moqe.quantized import BlockTensor
from moqe.schemes import SCHEMES, Scheme

Q5_1 = Scheme("q5_1", 5, symmetric=False, block="Q5_1", block_size=32, block_bytes=24)
"""Read from the files of others; no recipe asks for it, because q5_k is smaller and better."""

BLOCK_SCHEMES: dict[str, Scheme] = {scheme.block: scheme for scheme in (*SCHEMES.values(), Q5_1) if scheme.is_block}
"""Every type this module reads, by ggml's name."""


@dataclass(frozen=True)
class Planes:
    """How codes of `bits` bits lie in the bytes of `member`, `width` bytes to a group; see `split_planes`."""

    member: str
    bits: int
    width: int


@dataclass(frozen=True)
class Layout:
    """One block type.

    members: name and bytes of each struct member, in file order; float16 members are `d`, `dmin` and `m`.
    low, high: where the low and high bits of the codes are; `high` is None where one member holds the whole code.
    offset: by how much a code exceeds the integer that is multiplied by the scale.
    scales: how the `scales` member holds the scales (and mins) of the sub-blocks; "" where there are no sub-blocks.
    """

    members: tuple[tuple[str, int], ...]
    low: Planes
    high: Planes | None = None
    offset: int = 0
    scales: Literal["", "nibbles", "six_bit_signed", "six_bit_pairs", "bytes_signed"] = ""


LAYOUTS: dict[str, Layout] = {
    "Q4_0": Layout((("d", 2), ("qs", 16)), Planes("qs", 4, 16), offset=8),
    "Q4_1": Layout((("d", 2), ("m", 2), ("qs", 16)), Planes("qs", 4, 16)),
    "Q5_0": Layout((("d", 2), ("qh", 4), ("qs", 16)), Planes("qs", 4, 16), Planes("qh", 1, 1), offset=16),
    "Q5_1": Layout((("d", 2), ("m", 2), ("qh", 4), ("qs", 16)), Planes("qs", 4, 16), Planes("qh", 1, 1)),
    "Q8_0": Layout((("d", 2), ("qs", 32)), Planes("qs", 8, 32), offset=128),
    "Q2_K": Layout((("scales", 16), ("qs", 64), ("d", 2), ("dmin", 2)), Planes("qs", 2, 32), scales="nibbles"),
    "Q3_K": Layout(
        (("hmask", 32), ("qs", 64), ("scales", 12), ("d", 2)),
        Planes("qs", 2, 32),
        Planes("hmask", 1, 32),
        offset=4,
        scales="six_bit_signed",
    ),
    "Q4_K": Layout((("d", 2), ("dmin", 2), ("scales", 12), ("qs", 128)), Planes("qs", 4, 32), scales="six_bit_pairs"),
    "Q5_K": Layout(
        (("d", 2), ("dmin", 2), ("scales", 12), ("qh", 32), ("qs", 128)),
        Planes("qs", 4, 32),
        Planes("qh", 1, 32),
        scales="six_bit_pairs",
    ),
    "Q6_K": Layout(
        (("ql", 128), ("qh", 64), ("scales", 16), ("d", 2)),
        Planes("ql", 4, 64),
        Planes("qh", 2, 32),
        offset=32,
        scales="bytes_signed",
    ),
}
"""The types, by ggml's name."""

_HALVES = frozenset({"d", "dmin", "m"})


def split_planes(raw: Tensor, bits: int, width: int) -> Tensor:
    """The small integers in `raw`, uint8 (..., bytes): uint8 (..., bytes * 8 // bits).

    Bytes come in groups of `width`. A group yields first the lowest `bits` bits of each of its bytes in turn, then the
    next higher bits of each, and so on.
    """
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=raw.device)[:, None]
    groups = raw.reshape(*raw.shape[:-1], -1, 1, width)  # (..., groups, 1, width)
    return ((groups >> shifts) & ((1 << bits) - 1)).flatten(-3)


def join_planes(values: Tensor, bits: int, width: int) -> Tensor:
    """The inverse of `split_planes`: uint8 (..., n), each below 2**bits, to uint8 (..., n * bits // 8)."""
    planes = values.reshape(*values.shape[:-1], -1, 8 // bits, width)  # (..., groups, planes, width)
    joined = planes[..., 0, :].clone()
    for plane in range(1, 8 // bits):
        joined |= planes[..., plane, :] << (plane * bits)
    return joined.flatten(-2)


def unpack(raw: Tensor, scheme: Scheme) -> BlockTensor:
    """The fields of packed rows: uint8 (out, row_bytes), as a GGUF file stores them.

    Fields: `d` (`dmin`, `m`) float16 (out, blocks); `scales` (`mins`) (out, blocks, sub-blocks), uint8, or int8 for
    q3_k and q6_k. Codes are unsigned for every type: q8_0's are its int8 plus 128.

    Raises RecipeError for a scheme that is not a block type this module knows, CheckpointError when the rows are not
    made of whole blocks.
    """
    layout = _layout(scheme)
    rows, row_bytes = raw.shape
    if row_bytes % scheme.block_bytes:
        raise CheckpointError(
            f"a row of {row_bytes} bytes is not made of {scheme.name} blocks of {scheme.block_bytes} bytes: "
            "the tensor is truncated or of another type"
        )
    blocks = raw.reshape(rows, row_bytes // scheme.block_bytes, scheme.block_bytes)
    parts = dict(zip(_names(layout), torch.split(blocks, [size for _, size in layout.members], dim=-1), strict=True))
    codes = split_planes(parts[layout.low.member], layout.low.bits, layout.low.width)
    if layout.high is not None:
        codes |= split_planes(parts[layout.high.member], layout.high.bits, layout.high.width) << layout.low.bits
    elif scheme.block == "Q8_0":
        codes = codes ^ 0x80  # int8 + 128
    fields = {
        name: part.contiguous().view(torch.float16).squeeze(-1) for name, part in parts.items() if name in _HALVES
    }
    if layout.scales:
        fields |= _UNPACK_SCALES[layout.scales](parts["scales"])
    return BlockTensor(codes.reshape(rows, -1), fields, scheme=scheme)


def pack(tensor: BlockTensor) -> Tensor:
    """The bytes of a block tensor as a GGUF file stores them: uint8 (out, row_bytes). The inverse of `unpack`."""
    layout = _layout(tensor.scheme)
    rows = tensor.codes.shape[0]
    codes = tensor.codes.reshape(rows, -1, tensor.scheme.block_size)
    if tensor.scheme.block == "Q8_0":
        codes = codes ^ 0x80
    low = layout.low
    parts = {low.member: join_planes(codes & ((1 << low.bits) - 1), low.bits, low.width)}
    if layout.high is not None:
        parts[layout.high.member] = join_planes(codes >> low.bits, layout.high.bits, layout.high.width)
    for name in _HALVES & tensor.fields.keys():
        parts[name] = tensor.fields[name].contiguous()[..., None].view(torch.uint8)
    if layout.scales:
        parts["scales"] = _PACK_SCALES[layout.scales](tensor.fields)
    return torch.cat([parts[name] for name in _names(layout)], dim=-1).reshape(rows, -1)


def dequantize(tensor: BlockTensor) -> Tensor:
    """The weights a block tensor stands for: float32, (out, in), equal bit for bit to ggml's."""
    layout, fields = _layout(tensor.scheme), tensor.fields
    d = fields["d"].to(torch.float32)[..., None]  # (out, blocks, 1)
    scale = d * fields["scales"].to(torch.float32) if layout.scales else d  # (out, blocks, sub-blocks)
    codes = tensor.codes.reshape(*scale.shape, -1).to(torch.float32) - layout.offset  # (out, blocks, sub-blocks, n)
    weights = scale[..., None] * codes
    if "mins" in fields:
        dmin = fields["dmin"].to(torch.float32)[..., None]
        weights = weights - (dmin * fields["mins"].to(torch.float32))[..., None]
    elif "m" in fields:
        weights = weights + fields["m"].to(torch.float32)[..., None, None]
    return weights.reshape(tensor.codes.shape)


def _layout(scheme: Scheme) -> Layout:
    if scheme.block not in LAYOUTS:
        raise RecipeError(f"scheme {scheme.name} is not a ggml block type: use one of {', '.join(LAYOUTS).lower()}")
    return LAYOUTS[scheme.block]


def _names(layout: Layout) -> list[str]:
    return [name for name, _ in layout.members]


# q2_k: 16 bytes, the scale in the low nibble and the min in the high one.
def _unpack_nibbles(raw: Tensor) -> dict[str, Tensor]:
    return {"scales": raw & 0x0F, "mins": raw >> 4}


def _pack_nibbles(fields: dict[str, Tensor]) -> Tensor:
    return fields["scales"] | (fields["mins"] << 4)


# q3_k: 16 scales + 32; the low nibbles in 8 bytes, the high two bits in 4.
def _unpack_six_bit_signed(raw: Tensor) -> dict[str, Tensor]:
    scales = split_planes(raw[..., :8], 4, 8) | (split_planes(raw[..., 8:], 2, 4) << 4)
    return {"scales": scales.to(torch.int8) - 32}


def _pack_six_bit_signed(fields: dict[str, Tensor]) -> Tensor:
    scales = (fields["scales"] + 32).to(torch.uint8)
    return torch.cat((join_planes(scales & 0x0F, 4, 8), join_planes(scales >> 4, 2, 4)), dim=-1)


# q4_k, q5_k: 8 scales and 8 mins. Bytes 0-3 hold scales 0-3, bytes 4-7 mins 0-3, in six bits each; their two top bits
# are the top bits of scales and mins 4-7, whose low nibbles share bytes 8-11.
def _unpack_six_bit_pairs(raw: Tensor) -> dict[str, Tensor]:
    scales, mins, low = torch.split(raw, 4, dim=-1)
    return {
        "scales": torch.cat((scales & 0x3F, (low & 0x0F) | ((scales >> 6) << 4)), dim=-1),
        "mins": torch.cat((mins & 0x3F, (low >> 4) | ((mins >> 6) << 4)), dim=-1),
    }


def _pack_six_bit_pairs(fields: dict[str, Tensor]) -> Tensor:
    first_scales, last_scales = torch.split(fields["scales"], 4, dim=-1)
    first_mins, last_mins = torch.split(fields["mins"], 4, dim=-1)
    return torch.cat(
        (
            first_scales | ((last_scales >> 4) << 6),
            first_mins | ((last_mins >> 4) << 6),
            (last_scales & 0x0F) | ((last_mins & 0x0F) << 4),
        ),
        dim=-1,
    )


# q6_k: 16 int8.
def _unpack_bytes_signed(raw: Tensor) -> dict[str, Tensor]:
    return {"scales": raw.contiguous().view(torch.int8)}


def _pack_bytes_signed(fields: dict[str, Tensor]) -> Tensor:
    return fields["scales"].contiguous().view(torch.uint8)


_UNPACK_SCALES: dict[str, Callable[[Tensor], dict[str, Tensor]]] = {
    "nibbles": _unpack_nibbles,
    "six_bit_signed": _unpack_six_bit_signed,
    "six_bit_pairs": _unpack_six_bit_pairs,
    "bytes_signed": _unpack_bytes_signed,
}

_PACK_SCALES: dict[str, Callable[[dict[str, Tensor]], Tensor]] = {
    "nibbles": _pack_nibbles,
    "six_bit_signed": _pack_six_bit_signed,
    "six_bit_pairs": _pack_six_bit_pairs,
    "bytes_signed": _pack_bytes_signed,
}
