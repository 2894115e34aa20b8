"""One pass over the calibration text, block by block: the statistics that every expert is made from.

The hidden states of all windows stay in memory; blocks come and go, one at a time. Each block runs once over all
windows, which gives both the statistics of its linears' inputs and the hidden states that enter the next block.
Batches never mix domains, and their composition depends on the samples alone, so a pass that starts at block k sees
bit for bit what an undisturbed pass sees there.

Cost: one forward of the model over the calibration tokens, plus 2 x in^2 operations per token and group for H.
Memory: windows x window x hidden floats, one block, and in^2 floats per group and domain.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moqe.data.samples import TextSamples
from moqe.errors import DataError, NumericalError
from moqe.methods.statistics import InputStatistics, accumulate
from moqe.models.decoder import Decoder
from moqe.models.device import rounded_products
from moqe.models.discovery import find_groups
from moqe.models.groups import LinearGroup
from moqe.progress import Advance, Progress, Silent

BATCH_SIZE = 8
_PROBE_TOKENS = 16
_PROBE_SEED = 1

Replace = Callable[[int, nn.Module], AbstractContextManager[None]]
Statistics = Mapping[str, Mapping[str, InputStatistics]]
_Batches = Mapping[str, Sequence[Tensor]]


@dataclass(frozen=True)
class CalibratedBlock:
    """A block in full precision with what its linears saw.

    name: the block's full name, e.g. `model.layers.0`. module: the block, materialised until the next one is asked
    for. groups: its linears, grouped by input. statistics: by group key, then by domain.
    """

    index: int
    name: str
    module: nn.Module
    groups: tuple[LinearGroup, ...]
    statistics: Statistics


def calibrate(
    decoder: Decoder,
    samples: TextSamples,
    *,
    batch_size: int = BATCH_SIZE,
    start_block: int = 0,
    products: torch.dtype = torch.float32,
    replace: Replace | None = None,
    progress: Progress | None = None,
) -> Iterator[CalibratedBlock]:
    """Yield the blocks from `start_block` on, each with the statistics of the whole calibration set.

    Blocks before `start_block` are run but not observed, which is how an interrupted build resumes; `batch_size` must
    then be the same. products: what the inputs of products are rounded to, see `rounded_products`; with bfloat16 H is
    the sum of x x^T over rounded x. Inputs are those of the full-precision model, unless `replace` is given
    (`sequential: true`): it is called with every block but the last after its consumer is done; in the context it
    returns the block may have other weights and hooks, and the changed block makes the next block's inputs, at the
    price of a second run of each observed block.

    Raises DataError for no samples, NumericalError when activations are not finite, and what `Decoder.load_block` and
    `find_groups` raise.
    """
    batches = _batches(samples, batch_size)
    total = decoder.number_of_blocks
    if start_block >= total:
        return
    runs = total + (total - 1 - start_block if replace else 0)
    with (progress or Silent()).track("calibrate", runs * len(samples)) as advance, torch.no_grad():
        hidden = decoder.embed(samples.tokens, batch_size)  # (n, window, hidden)
        probe = torch.randn(1, _PROBE_TOKENS, hidden.shape[-1], generator=torch.Generator().manual_seed(_PROBE_SEED))
        probe = probe.to(hidden)
        probe_inputs = decoder.block_inputs(probe)
        sizes = {len(rows) for parts in batches.values() for rows in parts}
        inputs = {size: decoder.block_inputs(hidden[:size]) for size in sizes}
        for index, name in enumerate(decoder.block_names):
            block = decoder.load_block(index)
            try:
                observed, last = index >= start_block, index == total - 1
                step = _Step(
                    decoder, block, name, {size: each[index] for size, each in inputs.items()}, products, advance
                )
                if observed:
                    groups = find_groups(block, probe, probe_inputs[index], name)
                    statistics = step.observe(hidden, batches, groups, keep=replace is None)
                    yield CalibratedBlock(index, name, block, groups, statistics)
                if not last and (replace is not None or not observed):
                    with nullcontext() if replace is None else replace(index, block):
                        for parts in batches.values():
                            step.run(hidden, parts, keep=True)
            finally:
                decoder.release_block(index)


@dataclass(frozen=True)
class _Step:
    """One block, ready to run over all windows. inputs: its keyword arguments by batch size. products: see there."""

    decoder: Decoder
    block: nn.Module
    name: str
    inputs: Mapping[int, Mapping[str, Any]]
    products: torch.dtype
    advance: Advance

    def run(self, hidden: Tensor, parts: Sequence[Tensor], keep: bool) -> None:
        """Replace the hidden states of batches by the block's outputs; without `keep` only the block's hooks gain."""
        for rows in parts:
            with rounded_products(self.products, self.decoder.device):  # hooks multiply too
                outputs = self.decoder.run_block(self.block, hidden[rows], self.inputs[len(rows)])
            if not outputs.sum(dtype=torch.float32).isfinite():  # one pass, no temporary
                raise NumericalError(
                    f"activations after {self.name} are not finite on the calibration windows: check the base model's "
                    "weights, or calibrate in float32"
                )
            if keep:
                hidden[rows] = outputs
            self.advance(len(rows))

    def observe(self, hidden: Tensor, batches: _Batches, groups: Sequence[LinearGroup], keep: bool) -> Statistics:
        """Run the block and add up, by group and domain, what its linears receive."""
        statistics: dict[str, dict[str, InputStatistics]] = {group.key: {} for group in groups}
        for domain, parts in batches.items():
            handles = [
                self.block.get_submodule(key).register_forward_pre_hook(_adder(of_group, domain))
                for key, of_group in statistics.items()
            ]
            try:
                self.run(hidden, parts, keep)
            finally:
                for handle in handles:
                    handle.remove()
        return statistics


def _adder(of_group: dict[str, InputStatistics], domain: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    """A hook that adds a linear's input to the statistics of one group and domain."""

    def add(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs = args[0].reshape(-1, args[0].shape[-1])  # (tokens, in)
        of_group[domain] = accumulate(of_group.get(domain), inputs)

    return add


def _batches(samples: TextSamples, batch_size: int) -> _Batches:
    """Rows of the samples in batches, by domain."""
    if len(samples) == 0:
        raise DataError("there are no calibration windows: give data.calibration more text or a shorter data.window")
    domains = np.array(samples.domain)
    return {
        domain: torch.split(torch.from_numpy(np.flatnonzero(domains == domain)), batch_size)
        for domain in sorted(set(samples.domain))
    }
