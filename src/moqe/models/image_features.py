"""What a router sees of an image: the base model's first stage, or what an expert sees before its last layer.

`stem`: the output of the first convolution after a ReLU, averaged over a grid as fine as 2,048 numbers allow, from a
few positions of each cell: on a ResNet-50 a sixteenth of one layer. `backbone`: the input of the last linear,
averaged over positions: the paper's 2,048-d global feature on a ResNet-50, for the price of a whole forward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn

from moqe.errors import ModelError

FEATURES = 2048  # of the paper's router input


class _Seen(Exception):
    """No error: it ends a forward pass early."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value


def stem_features(network: nn.Module, first: str, pixels: Tensor) -> Tensor:
    """The first convolution's output, pooled: float32, (b, channels * grid * grid), for images, (b, 3, h, w).

    first: the name of the convolution. Raises ModelError when the network does not run it, or when it is none.
    """
    stage = first_stage(network, first, pixels)
    thinning = stem_thinning(*stage.shape[1:])
    rows, columns = (matrix.to(stage.device) for matrix in stem_pooling(*stage.shape[1:]))
    return (rows @ stage[:, :, ::thinning, ::thinning].relu() @ columns.T).flatten(1)


@torch.no_grad()
def first_stage(network: nn.Module, first: str, pixels: Tensor) -> Tensor:
    """The output of the convolution `first`, (b, channels, h, w). Raises as `stem_features` does."""

    def end(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        raise _Seen(output)

    stage = _run_until(network, first, lambda module: module.register_forward_hook(end), pixels)
    if stage.ndim != 4:
        raise ModelError(f"{first} gives no map of channels (b, channels, h, w): use router.feature backbone")
    return stage


def stem_thinning(channels: int, height: int, width: int) -> int:
    """Every how many positions of a first convolution's output are looked at: the more there are to a cell, the fewer.

    At least two a side and cell stay. A convolution with so many times the stride computes nothing else.
    """
    return max(1, min(height, width) // (2 * _grid(channels, height, width)))


def pooling(size: int, cells: int) -> Tensor:
    """The matrix that averages `size` positions over cells, as `adaptive_avg_pool1d` does: float32, (cells, size)."""
    return nn.functional.adaptive_avg_pool1d(torch.eye(size), cells).T.contiguous()


def stem_pooling(channels: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """What rows and columns of a thinned first stage are averaged by: (grid, rows) and (grid, columns)."""
    thinning, grid = stem_thinning(channels, height, width), _grid(channels, height, width)
    return pooling(-(-height // thinning), grid), pooling(-(-width // thinning), grid)


def _grid(channels: int, height: int, width: int) -> int:
    """Cells a side that a map is averaged over."""
    return max(1, min(isqrt(FEATURES // channels), height, width))


@torch.no_grad()
def backbone_features(network: nn.Module, last: str, pixels: Tensor) -> Tensor:
    """The input of the last layer, averaged over positions: float32, (b, features), for images, (b, 3, h, w).

    last: the name of the layer. Raises ModelError when the network does not run it.
    """

    def end(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        raise _Seen(arguments[0])

    features = _run_until(network, last, lambda module: module.register_forward_pre_hook(end), pixels)
    return features.mean((2, 3)) if features.ndim == 4 else features.flatten(1)


def _run_until(network: nn.Module, name: str, listen: Callable[[nn.Module], Any], pixels: Tensor) -> Tensor:
    """What a hook on the module `name` sees; the rest of the network is not run."""
    handle = listen(network.get_submodule(name))
    try:
        network(pixels)
    except _Seen as seen:
        return seen.value
    finally:
        handle.remove()
    raise ModelError(f"{type(network).__name__} does not run its module {name}")
