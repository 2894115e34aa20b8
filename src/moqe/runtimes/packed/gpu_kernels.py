"""4-bit codes on a GPU: `_weight_int4pack_mm`, and unpacking where it does not fit.

The kernel is CUDA's counterpart of the one in `tile_kernels`: bfloat16, groups of 32 to 256, outputs by 8, inputs by
its inner tiles of 16. The machines this project is tested on have no GPU: what is here has not been run.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from moqe.runtimes.packed.kernel import Multiply
from moqe.runtimes.packed.tile_kernels import GROUP_SIZES
from moqe.runtimes.packed.weight import GroupedWeight

_INNER_TILES = 8
_INPUTS = _INNER_TILES * 16


class GpuNibbleKernels:
    """A weight in CUDA's 4-bit tiles. Satisfies `Kernels`. tiles: of `pack_gpu`."""

    def __init__(self, tiles: Tensor, weight: GroupedWeight) -> None:
        self.shape, self.kind = weight.shape, f"gpu nibbles {weight.group_size}"
        self._tiles, self._group_size = tiles, weight.group_size
        zero = torch.zeros_like(weight.scale) if weight.shift is None else weight.shift
        self._grid = torch.stack([weight.scale.T, zero.T], -1).to(torch.bfloat16).contiguous()

    def candidates(self, rows: int) -> Mapping[str, Multiply]:
        """The kernel."""
        return {"tiles": self._tiled}

    def tensors(self) -> tuple[Tensor, ...]:
        """Tiles, scales and zeros."""
        return (self._tiles, self._grid)

    def _tiled(self, x: Tensor) -> Tensor:
        return torch._weight_int4pack_mm(x.to(torch.bfloat16), self._tiles, self._group_size, self._grid)


class GpuUnpackedKernels:
    """Codes of a byte each, unpacked for every product. Satisfies `Kernels`. codes: int8, (out, in)."""

    def __init__(self, codes: Tensor, weight: GroupedWeight, precision: torch.dtype) -> None:
        self.shape, self.kind = weight.shape, f"gpu unpacked {precision}"
        self._codes, self._precision = codes, precision
        self._scale, self._shift = weight.scale, weight.shift

    def candidates(self, rows: int) -> Mapping[str, Multiply]:
        """Unpacking."""
        return {"unpacked": self._unpacked}

    def tensors(self) -> tuple[Tensor, ...]:
        """Codes, scales and shifts."""
        return (self._codes, self._scale, *(() if self._shift is None else (self._shift,)))

    def _unpacked(self, x: Tensor) -> Tensor:
        outputs, inputs = self.shape
        weight = self._codes.view(outputs, self._scale.shape[1], -1) * self._scale[..., None]
        weight = weight if self._shift is None else weight + self._shift[..., None]
        return x.to(self._precision) @ weight.view(outputs, inputs).to(self._precision).T


def pack_gpu(codes: Tensor) -> Tensor:
    """Signed codes of at most 4 bits, int8 (out, in), in the kernel's tiles."""
    nibbles = (codes + 8).view(torch.uint8)
    pack = torch.ops.aten._convert_weight_to_int4pack
    tiles: Tensor = pack(nibbles[:, ::2] << 4 | nibbles[:, 1::2], _INNER_TILES)
    return tiles


def fits_gpu(weight: GroupedWeight, precision: torch.dtype) -> bool:
    """Whether the kernel takes a weight."""
    outputs, inputs = weight.shape
    sizes = weight.group_size in GROUP_SIZES and outputs % 8 == 0 and inputs % _INPUTS == 0
    return sizes and weight.bits <= 4 and precision == torch.bfloat16
