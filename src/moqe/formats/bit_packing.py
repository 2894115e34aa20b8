"""Small unsigned integers as a dense bit stream in 32-bit words, the layout of compressed-tensors and GPTQ.

Value i of a row occupies the bits i*b to i*b + b - 1 of the row, counted from the lowest bit of its first word; where b
does not divide 32, a value may straddle two words. 32 values therefore fill b words exactly.

Where b divides 8, no value straddles two bytes and the words are seen as bytes, lowest first as on every little-endian
machine and in every safetensors file. Other widths take 32 vectorised passes over 1/32 of the values each.
"""

from __future__ import annotations

import torch
from torch import Tensor


def packed_words(count: int, bits: int) -> int:
    """Words that `count` values of `bits` bits take."""
    return -(-count * bits // 32)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack unsigned codes below 2**bits, any integer type, (rows, columns): int32, (rows, packed_words)."""
    rows, columns = codes.shape
    if 8 % bits == 0:
        values = torch.zeros(rows, packed_words(columns, bits) * 32 // bits, dtype=torch.uint8, device=codes.device)
        values[:, :columns] = codes
        values = values.view(rows, -1, 8 // bits)
        octets = values[..., 0].clone()
        for position in range(1, 8 // bits):
            octets |= values[..., position] << position * bits
        return octets.view(torch.int32)
    chunks = -(-columns // 32)
    values = torch.zeros(rows, chunks * 32, dtype=torch.int64, device=codes.device)
    values[:, :columns] = codes
    values = values.view(rows, chunks, 32)
    words = torch.zeros(rows, chunks, bits, dtype=torch.int64, device=codes.device)
    for position in range(32):
        word, shift = divmod(position * bits, 32)
        words[..., word] |= values[..., position] << shift
        if shift + bits > 32:
            words[..., word + 1] |= values[..., position] >> (32 - shift)
    words &= 0xFFFFFFFF
    words -= (words >> 31) << 32  # two's complement: the upper half of the unsigned range becomes negative
    return words.view(rows, chunks * bits)[:, : packed_words(columns, bits)].to(torch.int32).contiguous()


def unpack(words: Tensor, bits: int, columns: int) -> Tensor:
    """Undo `pack`: uint8, (rows, columns), from int32 words, (rows, packed_words)."""
    rows = words.shape[0]
    mask = (1 << bits) - 1
    if 8 % bits == 0:
        # A copy, because a contiguous tensor of one column may keep strides that forbid looking at its bytes.
        octets = words.clone(memory_format=torch.contiguous_format).view(torch.uint8)  # (rows, 4 * words)
        parts = [octets >> position * bits & mask for position in range(8 // bits)]
        return torch.stack(parts, -1).view(rows, -1)[:, :columns].contiguous()
    chunks = -(-columns // 32)
    padded = torch.zeros(rows, chunks * bits, dtype=torch.int64, device=words.device)
    padded[:, : words.shape[1]] = words.to(torch.int64) & 0xFFFFFFFF
    padded = padded.view(rows, chunks, bits)
    values = torch.empty(rows, chunks, 32, dtype=torch.uint8, device=words.device)
    for position in range(32):
        word, shift = divmod(position * bits, 32)
        value = padded[..., word] >> shift
        if shift + bits > 32:
            value = value | padded[..., word + 1] << (32 - shift)
        values[..., position] = (value & mask).to(torch.uint8)
    return values.view(rows, chunks * 32)[:, :columns].contiguous()
