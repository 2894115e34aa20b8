"""Round a weight matrix to one of ggml's block types with the least weighted squared error that the search finds.

Cost: 0.05 to 0.25 microseconds a weight on one core, about twice ggml's own K-quant search, plus a few megabytes: rows
are done in chunks that stay in the processor's cache. A row's result does not depend on the other rows. On the CPU each
chunk belongs to one thread: its thousands of short operations would otherwise wait for each other's threads, which on a
busy machine was measured to take thirty times as long.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from moqe.errors import NumericalError, UnsupportedLayer
from moqe.formats.ggml_blocks import LAYOUTS
from moqe.methods.ggml_search import HALF_MAX, Blocks, search_scale, search_scale_and_minimum
from moqe.methods.ggml_superblocks import fit_affine, fit_symmetric
from moqe.quantized import BlockTensor
from moqe.schemes import Scheme

_CPU_CHUNK = 1 << 17  # weights at a time: what stays in a core's cache
_DEVICE_CHUNK = 1 << 22  # what keeps an accelerator busy


@dataclass(frozen=True)
class SymmetricGrid:
    """A type `d * q` or `d * scales * q`.

    run: weights in a sub-block. low, high: the values of its codes. spans: candidates of the scale search, see
    `search_scale`. scales: range of the sub-blocks' integers; None where there are no sub-blocks. moves: see
    `fit_symmetric`.
    """

    run: int
    low: int
    high: int
    spans: tuple[float, ...]
    scales: tuple[int, int] | None = None
    moves: tuple[int, ...] = ()


@dataclass(frozen=True)
class AffineGrid:
    """A type `d * q + m` or `d * scales * q - dmin * mins`, with codes from 0 to `high`.

    run: weights in a sub-block. spans: see `search_scale_and_minimum`. scales: the largest integer scale and min of a
    sub-block; 0 means neither.
    """

    run: int
    high: int
    spans: tuple[tuple[float, float], ...]
    scales: int = 0


def _steps(first: float, last: float, count: int) -> tuple[float, ...]:
    return tuple(first + (last - first) * step / (count - 1) for step in range(count))


def _ranges(*parts: tuple[tuple[float, ...], tuple[float, ...]]) -> tuple[tuple[float, float], ...]:
    """Every span of a part at every position of it: 0 cuts from the top, 1 from below, 0.5 from both."""
    return tuple((span, below) for spans, positions in parts for span in spans for below in positions)


_EVERYWHERE = (0.0, 0.5, 1.0)

# The finer a type, the less is won by clipping and the more by trying many nearly equal scales.
GRIDS: dict[str, SymmetricGrid | AffineGrid] = {
    "q4_0": SymmetricGrid(32, -8, 7, _steps(0.55, 1.08, 14)),
    "q5_0": SymmetricGrid(32, -16, 15, _steps(0.65, 1.06, 14)),
    "q8_0": SymmetricGrid(32, -127, 127, _steps(0.96, 1.08, 20)),
    "q3_k": SymmetricGrid(16, -4, 3, _steps(0.45, 1.1, 12), (-32, 31), (-1, 1)),
    "q6_k": SymmetricGrid(16, -32, 31, _steps(0.85, 1.07, 12), (-128, 127), (-3, -2, -1, 1, 2, 3)),
    "q4_1": AffineGrid(32, 15, _ranges(((0.55, 0.7, 0.82, 0.9, *_steps(0.96, 1.2, 5)), _EVERYWHERE))),
    "q2_k": AffineGrid(16, 3, _ranges(((0.35, 0.5, 0.65, 0.8), _EVERYWHERE), ((0.95, 1.1, 1.3), (0.5,))), 15),
    "q4_k": AffineGrid(32, 15, _ranges(((0.55, 0.7, 0.82, 0.9, *_steps(0.96, 1.2, 5)), _EVERYWHERE)), 63),
    "q5_k": AffineGrid(32, 31, _ranges(((0.65, 0.85, *_steps(0.93, 1.12, 6)), _EVERYWHERE)), 63),
}
"""How each type that a recipe may ask for is searched."""


def round_to_blocks(weight: Tensor, weighting: Tensor | None, scheme: Scheme) -> BlockTensor:
    """Round `weight`, float32 (out, in), to block type `scheme`, minimising `sum weighting * error^2`.

    weighting: positive, of a magnitude around one: (in,) or (out, in), or None for all ones.

    Raises UnsupportedLayer where rows are not made of whole blocks; NumericalError where weights are not finite, and
    where they are so large that a scale would overflow float16.
    """
    weight, columns = weight.detach(), weight.shape[1]
    if columns % scheme.block_size:
        fix = (
            "block_fallback to a type with blocks of 32 (q4_0, q4_1, q5_0, q8_0), or " if scheme.block_size > 32 else ""
        )
        raise UnsupportedLayer(
            f"rows of {columns} weights are not made of {scheme.name} blocks of {scheme.block_size}: "
            f"set {fix}on_unsupported to keep"
        )
    grid = GRIDS[scheme.name]
    _check_range(weight, grid, scheme)
    rows = max(1, (_CPU_CHUNK if weight.device.type == "cpu" else _DEVICE_CHUNK) // columns)
    parts = _each_in_one_thread(
        lambda start: _round(weight[start : start + rows], _rows_of(weighting, start, rows), grid, scheme),
        range(0, weight.shape[0], rows),
        weight.device,
    )
    fields = {name: torch.cat([part.fields[name] for part in parts]) for name in parts[0].fields}
    return BlockTensor(torch.cat([part.codes for part in parts]), fields, scheme=scheme)


def _rows_of(weighting: Tensor | None, start: int, rows: int) -> Tensor | None:
    return weighting if weighting is None or weighting.dim() == 1 else weighting[start : start + rows]


def _each_in_one_thread(
    task: Callable[[int], BlockTensor], starts: Sequence[int], device: torch.device
) -> list[BlockTensor]:
    """The tasks' results in order, at most as many at a time as torch has threads, each on a single one."""
    threads = torch.get_num_threads()
    if threads == 1 or device.type != "cpu":
        return [task(start) for start in starts]
    try:
        with ThreadPoolExecutor(min(threads, len(starts)), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(task, starts))
    finally:
        torch.set_num_threads(threads)  # the setting is each thread's own, but new threads inherit the latest


def _check_range(weight: Tensor, grid: SymmetricGrid | AffineGrid, scheme: Scheme) -> None:
    largest = float(weight.abs().max())
    if not torch.isfinite(weight).all():
        raise NumericalError("the weight holds NaN or infinity: check the base model's files")
    if isinstance(grid, SymmetricGrid):
        limit = HALF_MAX * grid.high * (grid.scales[1] if grid.scales else 1)
    else:
        limit = HALF_MAX * max(grid.scales, 1)  # what the smallest, all-min weight can be
    if largest > limit:
        raise NumericalError(
            f"overflow: a weight of magnitude {largest:.3g} needs a {scheme.name} scale beyond float16's 65504 "
            f"(the limit is {limit:.3g}); keep this layer in full precision with on_unsupported: keep"
        )


def _round(weight: Tensor, weighting: Tensor | None, grid: SymmetricGrid | AffineGrid, scheme: Scheme) -> BlockTensor:
    """Round a few rows."""
    rows, columns = weight.shape
    count = rows * columns // scheme.block_size
    subs = scheme.block_size // grid.run

    def arranged(values: Tensor) -> Tensor:  # (out, in) -> (n, sub-blocks, blocks)
        return values.reshape(count, subs, -1).permute(2, 1, 0).contiguous()

    x = arranged(weight.to(torch.float32))
    w = None if weighting is None else arranged(weighting.expand(rows, columns))
    fields: dict[str, Tensor]
    if isinstance(grid, SymmetricGrid):
        blocks = Blocks(x, w, grid.low, grid.high)
        if grid.scales is None:
            scale = search_scale(blocks, grid.spans, stored=True)
            fields = {"d": scale[0]}
        else:
            fit = fit_symmetric(blocks, grid.spans, *grid.scales, grid.moves)
            scale = fit.d * fit.scales
            fields = {"d": fit.d, "scales": fit.scales.to(torch.int8)}
        codes = blocks.codes(scale, None) + LAYOUTS[scheme.block].offset
    else:
        blocks = Blocks(x, w, 0, grid.high)
        if not grid.scales:
            scale, minimum = search_scale_and_minimum(blocks, grid.spans, stored=True)
            fields = {"d": scale[0], "m": -minimum[0]}
        else:
            affine = fit_affine(blocks, grid.spans, grid.scales)
            scale, minimum = affine.d * affine.scales, affine.dmin * affine.mins
            fields = {"d": affine.d, "dmin": affine.dmin}
            fields |= {"scales": affine.scales.to(torch.uint8), "mins": affine.mins.to(torch.uint8)}
        codes = blocks.codes(scale, minimum)

    def stored(values: Tensor) -> Tensor:  # (blocks,) -> (out, blocks of a row); (sub-blocks, blocks) likewise
        if values.dim() == 2:
            return values.T.reshape(rows, -1, subs)
        return values.to(torch.float16).reshape(rows, -1)

    flat = codes.permute(2, 1, 0).reshape(rows, columns).to(torch.uint8)
    return BlockTensor(flat, {name: stored(values) for name, values in fields.items()}, scheme=scheme)
