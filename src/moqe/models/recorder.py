"""Learning what a decoder passes to its blocks: each block is swapped for a recorder while the model's forward runs.

A model's own forward does everything around the blocks (embedding, positions, masks per layer, final norm, head). So
instead of imitating it, MoQE runs it with recorders, which note what the block would have been given and pass the
hidden states through. No tracing is involved.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


class Recorder(nn.Module):
    """Stands in for a block: notes its arguments, hands the hidden states on, and has the block's attributes."""

    def __init__(self, block: nn.Module, answer: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self._block = (block,)  # in a tuple, so that the block does not become a submodule
        self._answer = answer
        self.hidden: Tensor | None = None
        self.kwargs: Mapping[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_block"][0], name)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Note everything, run nothing."""
        names = list(inspect.signature(self._block[0].forward).parameters)[1:]
        self.hidden, self.kwargs = hidden, {**dict(zip(names, args, strict=False)), **kwargs}
        return self._answer(hidden)


@contextmanager
def recorders(blocks: nn.ModuleList, answers: Sequence[Callable[[Tensor], Any]]) -> Iterator[list[Recorder]]:
    """Swap a list's blocks for recorders inside the context; recorder k returns `answers[k](hidden)`."""
    originals = list(blocks)
    swapped = [Recorder(block, answer) for block, answer in zip(originals, answers, strict=True)]
    try:
        for index, recorder in enumerate(swapped):
            blocks[index] = recorder
        yield swapped
    finally:
        for index, block in enumerate(originals):
            blocks[index] = block
