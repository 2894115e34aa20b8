"""From block to block through a network: what goes into each of them for all images, and what comes out.

Where a block reads the very tensor that the block before it made, untouched, what came out there is what goes in here,
and nothing is run again. Elsewhere, behind a pooling, a function or an addition that no block holds, or on a branch of
its own, the network runs from its beginning up to the block.

Cost: one pass over the images through each block, and for each block that does not follow another, one through all that
lies before it. That is the pooled end of a residual network, and every layer of a plain stack with functions in
between, where the cost grows with the square of the depth. Memory: input and output of one block for all images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from moqe.methods.vision.method import CalibrationImages
from moqe.methods.vision.observe import BATCH, batches
from moqe.models import observation


def followers(network: nn.Module, blocks: Sequence[str], example: Tensor) -> frozenset[str]:
    """The blocks whose input is the output of the block before them, as it left there.

    blocks: in the order they run. example: images, (b, 3, h, w). Raises ModelError when the network cannot run on them.
    """
    run = observation.observe(network, example)
    calls = [run.calls_of(block)[0] for block in blocks]
    return frozenset(
        call.name for last, call in pairwise(calls) if call.source is not None and call.source == last.result
    )


@torch.no_grad()
def inputs_of(network: nn.Module, name: str, images: CalibrationImages) -> Tensor:
    """What goes into a module for all images, (n, ...), by running the network up to there."""
    parts = list[Tensor]()
    handle = network.get_submodule(name).register_forward_pre_hook(_stop_at(parts))
    try:
        for batch in batches(images):
            try:
                network(batch.contiguous(memory_format=torch.channels_last))
            except _Stopped:
                continue
    finally:
        handle.remove()
    return torch.cat(parts)


@torch.no_grad()
def outputs_of(module: nn.Module, inputs: Tensor) -> Tensor:
    """What comes out of a module: (n, ...) to (n, ...). The inputs are spent: a module may write to them."""
    return torch.cat([module(part) for part in torch.split(inputs, BATCH)])


class _Stopped(Exception):
    """A forward pass that has seen enough."""


def _stop_at(parts: list[Tensor]) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def hook(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        parts.append(arguments[0].clone())
        raise _Stopped

    return hook
