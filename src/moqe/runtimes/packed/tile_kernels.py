"""4-bit codes with scales by group, multiplied in bfloat16: `_weight_int4pack_mm_for_cpu`, and its tiles unpacked.

The kernel computes (code - 8) * scale + zero with unsigned codes and one scale and zero, bfloat16, for each group of 32
to 256 inputs. It is the fastest for a few rows; it makes its weights anew for every few rows, so many rows are faster
with tiles unpacked once and a bfloat16 product, which has matrix instructions on processors with AMX.

The layout of its codes is PyTorch's own affair and depends on the processor. With AVX-512 a tile is 64 outputs, and for
every input 32 bytes, whose low nibbles are the first 32 outputs and whose high nibbles are the others. `tile_outputs`
finds out by packing a pattern whether that is so here, for tiles of that or another width; where it is not, weights are
packed for `bag_kernels`.

bfloat16 costs 2^-9 of scales that are stored in float16, of shifts, inputs and outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor

from moqe.runtimes.packed.kernel import Multiply
from moqe.runtimes.packed.weight import GroupedWeight

GROUP_SIZES = (256, 128, 64, 32)
_FEW = 64
_ELEMENTS = 1 << 20  # unpacked at a time
_WIDTHS = (64, 32, 16)


class TileKernels:
    """A weight in the kernel's tiles. Satisfies `Kernels`. tiles: of `pack_tiles`. weight: its scales and shifts."""

    def __init__(self, tiles: Tensor, weight: GroupedWeight) -> None:
        self.shape = weight.shape
        self._tiles, self._group_size = tiles, weight.group_size
        zero = torch.zeros_like(weight.scale) if weight.shift is None else weight.shift
        self._shifted = weight.shift is not None
        self._grid = torch.stack([weight.scale.T, zero.T], -1).to(torch.bfloat16)  # (groups, out, 2)
        self.kind = f"tiles {self._group_size}"

    def candidates(self, rows: int) -> Mapping[str, Multiply]:
        """The kernel for few rows; unpacking for all, with either product, because not every processor has both."""
        found: dict[str, Multiply] = {"unpacked": self.unpacked, "unpacked, float32": self.widened}
        return {"tiles": self.tiled, **found} if rows <= _FEW else found

    def tensors(self) -> tuple[Tensor, ...]:
        """Tiles, scales and zeros."""
        return (self._tiles, self._grid)

    def tiled(self, x: Tensor) -> Tensor:
        """By PyTorch's kernel: bfloat16."""
        kernel = torch.ops.aten._weight_int4pack_mm_for_cpu
        product: Tensor = kernel(x.to(torch.bfloat16), self._tiles, self._group_size, self._grid)
        return product

    def unpacked(self, x: Tensor) -> Tensor:
        """The product with weights unpacked for the occasion: bfloat16."""
        return x.to(torch.bfloat16) @ self.weight()

    def widened(self, x: Tensor) -> Tensor:
        """The same with a float32 product: float32. Faster where a processor has no instructions for bfloat16."""
        return x.to(torch.float32) @ self.weight().to(torch.float32)

    def weight(self) -> Tensor:
        """The weights: bfloat16, (in, out)."""
        outputs, inputs = self.shape
        width, size = tile_outputs(), self._group_size
        tiles = self._tiles.view(outputs // width, inputs, width // 2).transpose(0, 1)  # (in, tiles, bytes)
        scale, zero = (part.contiguous() for part in self._grid.unbind(-1))  # strides would cost five times as much
        scale = scale / 16  # exact, and so are codes times 16, which take fewer steps to make
        weight = torch.empty(inputs, outputs, dtype=torch.bfloat16)
        step = max(1, _ELEMENTS // (outputs * size)) * size
        for start in range(0, inputs, step):
            signed = (tiles[start : start + step] ^ 0x88).view(torch.int8)  # nibbles less 8, in two's complement
            part = weight[start : start + step]
            halves = part.view(-1, outputs // width, 2, width // 2)
            halves[:, :, 0] = signed << 4
            halves[:, :, 1] = signed & -16
            groups = slice(start // size, (start + len(signed)) // size)
            scaled = part.view(-1, size, outputs).mul_(scale[groups, None])
            if self._shifted:
                scaled.add_(zero[groups, None])
        return weight


def pack_tiles(codes: Tensor) -> Tensor:
    """Signed codes of at most 4 bits, int8 (out, in), in the kernel's tiles: uint8, (out, in / 2)."""
    tiles: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32).add_(8), 2)
    return tiles


def fits_tiles(weight: GroupedWeight) -> bool:
    """Whether the kernel takes a weight and this processor's tiles are known."""
    width = tile_outputs()
    return bool(width) and weight.bits <= 4 and weight.group_size in GROUP_SIZES and weight.shape[0] % width == 0


@cache
def tile_outputs() -> int:
    """Outputs in a tile on this processor; 0 where the layout is another one. See above."""
    pattern = (torch.arange(128)[:, None] * 5 + torch.arange(32) * 3 + torch.arange(128)[:, None] // 16) % 16
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(pattern.to(torch.int32), 2)
    for width in _WIDTHS:
        tiles = pattern.view(128 // width, 2, width // 2, 32).permute(0, 3, 1, 2)  # (tiles, in, halves, bytes)
        if torch.equal((tiles[:, :, 0] | tiles[:, :, 1] << 4).to(torch.uint8).flatten(), packed.flatten()):
            return width
    return 0
