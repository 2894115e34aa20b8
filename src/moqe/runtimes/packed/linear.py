"""A linear layer whose weight stays packed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from moqe.runtimes.packed.bag_kernels import BagKernels, bag_table
from moqe.runtimes.packed.byte_kernels import ByteKernels
from moqe.runtimes.packed.float_kernels import FloatKernels
from moqe.runtimes.packed.gpu_kernels import GpuNibbleKernels, GpuUnpackedKernels, fits_gpu, pack_gpu
from moqe.runtimes.packed.kernel import Choice, Kernels, Multiply
from moqe.runtimes.packed.tile_kernels import GROUP_SIZES, TileKernels, fits_tiles, pack_tiles
from moqe.runtimes.packed.weight import GroupedWeight


class PackedCodes:
    """Codes as kernels want them, in memory once for all weights that have the same ones. Safe in several threads.

    They live as long as a weight uses them.
    """

    def __init__(self) -> None:
        self._codes: WeakValueDictionary[object, Tensor] = WeakValueDictionary()
        self._lock = threading.Lock()

    def of(self, weight: GroupedWeight, layout: str, pack: Callable[[Tensor], Tensor]) -> Tensor:
        """The codes of a weight, packed by `pack`, which `layout` names, unless somebody has them so."""
        if weight.key is None:
            return pack(weight.codes())
        key = (layout, *weight.key)
        with self._lock:
            codes = self._codes.get(key)
            if codes is None:
                codes = self._codes[key] = pack(weight.codes())
            return codes


class PackedLinear:
    """y = W x + bias by the fastest of a weight's kernels.

    bias: float32, (out,), or None. activation_bits: inputs are rounded to as many per token, by the kernels
    or before them.
    """

    def __init__(self, kernels: Kernels, bias: Tensor | None, choice: Choice, activation_bits: int = 16) -> None:
        self.kernels, self.bias, self.choice = kernels, bias, choice
        self._half = float(1 << (activation_bits - 1))
        self._rounds = activation_bits < 16 and not isinstance(kernels, ByteKernels)

    def __call__(self, x: Tensor) -> Tensor:
        """(rows, in) to (rows, out), float32 or bfloat16 as the kernel has it."""
        return self._around(partial(self.choice.multiply, self.kernels), x)

    def settled(self, rows: int, device: torch.device) -> Callable[[Tensor], Tensor] | None:
        """The same for so many rows, without a choice; None before one was made."""
        multiply = self.choice.settled(self.kernels, rows, device)
        return None if multiply is None else partial(self._around, multiply)

    def _around(self, multiply: Multiply, x: Tensor) -> Tensor:
        if not self._rounds:
            product = multiply(x)
        else:
            x = x.to(torch.float32)
            scale = x.abs().amax(-1, True).div_(self._half - 0.5).clamp_min_(torch.finfo(torch.float32).tiny)
            codes = (x / scale).clamp_max_(self._half - 1).round_()  # exact in bfloat16 too
            product = multiply(codes).to(torch.float32) * scale
        return product if self.bias is None else product + self.bias


class Together:
    """Linears with the same input whose weights cannot be one; their results one after the other, float32."""

    def __init__(self, linears: Sequence[PackedLinear]) -> None:
        self.linears = tuple(linears)

    def __call__(self, x: Tensor) -> Tensor:
        """(rows, in) to (rows, sum of out)."""
        return _in_turn(self.linears, x)

    def settled(self, rows: int, device: torch.device) -> Callable[[Tensor], Tensor] | None:
        """See `PackedLinear.settled`."""
        found = [linear.settled(rows, device) for linear in self.linears]
        ways = tuple(way for way in found if way is not None)
        return partial(_in_turn, ways) if len(ways) == len(found) else None


def _in_turn(linears: Sequence[Callable[[Tensor], Tensor]], x: Tensor) -> Tensor:
    return torch.cat([linear(x).to(torch.float32) for linear in linears], 1)


def pack_kernels(weight: GroupedWeight | Tensor, precision: torch.dtype, packed: PackedCodes) -> Kernels:
    """The kernels for a weight: quantized, or float, (out, in).

    precision: float32 keeps products as accurate as float32's, bfloat16 rounds inputs and results to that type where
    it is faster. packed: where codes are shared.
    """
    if isinstance(weight, Tensor):
        return FloatKernels(weight.to(precision))
    if weight.groups == 1 and weight.bits > 4:
        return ByteKernels(packed.of(weight, "bytes", torch.Tensor.contiguous), weight, precision)
    if weight.bits <= 4 and weight.group_size not in GROUP_SIZES:  # one scale a row, for example
        fitting = [size for size in GROUP_SIZES if weight.group_size % size == 0]
        weight = weight.regrouped(fitting[0]) if fitting else weight
    if weight.scale.device.type != "cpu":
        if fits_gpu(weight, precision):
            return GpuNibbleKernels(packed.of(weight, "gpu nibbles", pack_gpu), weight)
        return GpuUnpackedKernels(packed.of(weight, "bytes", torch.Tensor.contiguous), weight, precision)
    if precision == torch.bfloat16 and fits_tiles(weight):
        return TileKernels(packed.of(weight, "tiles", pack_tiles), weight)
    wide = weight.bits > 4
    table = packed.of(weight, f"bags {wide}", lambda codes: bag_table(codes, weight.bits))
    return BagKernels(table, weight, precision)
