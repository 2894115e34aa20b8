"""Keys and values of the tokens seen so far, in tensors that do not grow."""

from __future__ import annotations

import torch
from torch import Tensor


class KeyValueCache:
    """A static cache for one batch, each row of which may have its own length.

    Room for `size` tokens a row is taken at once. lengths: int64, (batch,), tokens that a row has. Keys and values are
    float32 and lie side by side: (2, batch, heads, size, head_dim) a block. longest: tokens of the longest row. even:
    whether all rows have as many.
    """

    def __init__(self, blocks: int, batch: int, heads: int, size: int, head_dim: int, device: torch.device) -> None:
        shape = (2, batch, heads, size, head_dim)
        self.blocks = [torch.zeros(shape, device=device) for _ in range(blocks)]
        self.size = size
        self.set_lengths(torch.zeros(batch, dtype=torch.int64, device=device))

    def set_lengths(self, lengths: Tensor) -> None:
        """Say how many tokens each row has: what was stored beyond is forgotten. int64, (batch,)."""
        self.lengths = lengths
        self.longest = int(lengths.max())
        self.even = self.longest == int(lengths.min())

    def step(self) -> None:
        """Every row is going to have one more token, at its `lengths` before this call."""
        self.lengths = self.lengths + 1
        self.longest += 1

    def fill(self, block: int, entries: Tensor) -> None:
        """Store the first tokens of every row. entries: (2, batch, heads, t, head_dim)."""
        self.blocks[block][:, :, :, : entries.shape[3]] = entries

    def mask(self) -> Tensor | None:
        """What to add to scores so that rows do not see beyond their lengths, (batch, 1, 1, longest); None if equal."""
        if self.even:
            return None
        positions = torch.arange(self.longest, device=self.lengths.device)
        beyond = positions >= self.lengths[:, None]
        return torch.zeros(beyond.shape, device=beyond.device).masked_fill_(beyond, float("-inf"))[:, None, None]


def append(stored: Tensor, entries: Tensor, longest: int, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """Store a token a row in one block; keys and values up to it, (batch * heads, longest, head_dim) each.

    stored: one of `KeyValueCache.blocks`. entries: (2, batch, heads, head_dim). longest, lengths: tokens of the longest
    row and of each, the new one included; `lengths` is None where all rows have as many.
    """
    if lengths is None:
        stored.select(3, longest - 1).copy_(entries)
    else:
        stored[:, torch.arange(len(lengths), device=lengths.device), :, lengths - 1] = entries.transpose(0, 1)
    seen = stored.flatten(1, 2)[:, :, :longest]
    return seen[0], seen[1]
