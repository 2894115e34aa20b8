"""Keys and values of the tokens seen so far, in tensors that do not grow."""

from __future__ import annotations

import torch
from torch import Tensor


class KeyValueCache:
    """A static cache for one batch, each row of which may have its own length.

    Room for `size` tokens a row is taken at once. lengths: int64, (batch,), tokens that a row has. Keys and values are
    float32 and lie side by side: (2, batch, heads, size, head_dim) a block.
    """

    def __init__(self, blocks: int, batch: int, heads: int, size: int, head_dim: int, device: torch.device) -> None:
        shape = (2, batch, heads, size, head_dim)
        self.blocks = [torch.zeros(shape, device=device) for _ in range(blocks)]
        self.size = size
        self.set_lengths(torch.zeros(batch, dtype=torch.int64, device=device))

    def set_lengths(self, lengths: Tensor) -> None:
        """Say how many tokens each row has: what was stored beyond is forgotten. int64, (batch,)."""
        self.lengths = lengths
        self._longest = int(lengths.max())
        self._even = self._longest == int(lengths.min())
        self._rows = torch.arange(len(lengths), device=lengths.device)

    def step(self) -> None:
        """Every row is going to have one more token, at its `lengths` before this call."""
        self.lengths = self.lengths + 1
        self._longest += 1

    def fill(self, block: int, entries: Tensor) -> None:
        """Store the first tokens of every row. entries: (2, batch, heads, t, head_dim)."""
        self.blocks[block][:, :, :, : entries.shape[3]] = entries

    def append(self, block: int, entries: Tensor) -> tuple[Tensor, Tensor]:
        """Store the token that `step` made room for; keys and values up to it, (batch * heads, longest, head_dim) each.

        entries: (2, batch, heads, head_dim).
        """
        stored = self.blocks[block]
        if self._even:
            stored.select(3, self._longest - 1).copy_(entries)
        else:
            stored[:, self._rows, :, self.lengths - 1] = entries.transpose(0, 1)
        seen = stored.flatten(1, 2)[:, :, : self._longest]
        return seen[0], seen[1]

    def mask(self) -> Tensor | None:
        """What to add to scores so that rows do not see beyond their lengths, (batch, 1, 1, longest); None if equal."""
        if self._even:
            return None
        positions = torch.arange(self._longest, device=self.lengths.device)
        beyond = positions >= self.lengths[:, None]
        return torch.zeros(beyond.shape, device=beyond.device).masked_fill_(beyond, float("-inf"))[:, None, None]
