"""Small unsigned integers as a dense bit stream in 32-bit words, the layout of compressed-tensors and GPTQ.

Value i of a row occupies the bits i*b to i*b + b - 1 of the row, counted from the lowest bit of its first word; where b
does not divide 32, a value may straddle two words. 32 values therefore fill b words exactly.

Words are seen as bytes, and numbers of several bytes as bytes, lowest first as on every little-endian machine and in
every safetensors file. Packing takes 8 / b passes where b divides 8 and 32 passes over 1/32 of the values otherwise;
unpacking widens runs of up to eight values by shifting halves apart, in passes of one byte a value.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WIDTHS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # integers of so many bytes


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
    # A copy, because a contiguous tensor of one column may keep strides that forbid looking at its bytes.
    if bits == 8:
        return words.clone(memory_format=torch.contiguous_format).view(torch.uint8)[:, :columns].contiguous()
    if 8 % bits == 0:
        together = 8 // bits
        octets = words.clone(memory_format=torch.contiguous_format).view(torch.uint8)  # (rows, 4 * words)
        values = _spread(octets.to(_WIDTHS[together]), bits, together)
    else:
        values = _spread(_eights(words, bits), bits, 8)
    return values.view(rows, -1)[:, :columns].contiguous()


def _eights(words: Tensor, bits: int) -> Tensor:
    """The bits of eight neighbouring values as one number: int64, (rows, eights), of a width that does not divide 8.

    32 values fill `bits` words, so there are four numbers of `bits` bytes to that many words.
    """
    rows, chunks = words.shape[0], -(-words.shape[1] // bits)
    whole = words
    if words.shape[1] != chunks * bits:
        whole = torch.zeros(rows, chunks * bits, dtype=torch.int32, device=words.device)
        whole[:, : words.shape[1]] = words
    whole = whole.reshape(rows, chunks, bits)
    eights = torch.empty(rows, chunks, 4, dtype=torch.int64, device=words.device)
    for position in range(4):
        word, shift = divmod(position * 8 * bits, 32)
        value = (whole[..., word].to(torch.int64) & 0xFFFFFFFF) >> shift
        for further in range(1, -(-(shift + 8 * bits) // 32)):
            value |= (whole[..., word + further].to(torch.int64) & 0xFFFFFFFF) << 32 * further - shift
        eights[..., position] = value & (1 << 8 * bits) - 1
    return eights.view(rows, -1)


def _spread(numbers: Tensor, bits: int, count: int) -> Tensor:
    """Give each of the `count` values in the low bits of every number a byte of its own: uint8, (rows, count * n).

    numbers: (rows, n), `count` bytes each, overwritten. Upper halves move away from lower ones, then the same within
    halves and within quarters: log2(count) times four operations, each on as many bytes as the result has.
    """
    together = count // 2
    while together:
        run = (1 << together * bits) - 1
        uppers = sum(run << start + together * bits for start in range(0, 8 * count, 16 * together))
        upper = numbers & uppers
        numbers ^= upper
        numbers |= upper.bitwise_left_shift_((8 - bits) * together)
        together //= 2
    return numbers.view(torch.uint8)
