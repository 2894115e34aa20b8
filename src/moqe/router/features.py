"""What a router sees of a sample: a sequence of vectors (text), one vector (images), and their mean."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Features(Protocol):
    """Router inputs of n samples, made on demand so that they never have to be in memory all at once."""

    dimension: int

    def __len__(self) -> int: ...

    def batch(self, rows: Tensor) -> Tensor:
        """Features of the samples at `rows`, int64 (b,): float32, (b, tokens, dimension) or (b, dimension)."""

    def pooled(self) -> Tensor:
        """One vector per sample: float32, (n, dimension); the mean over tokens where there are tokens."""


class TokenFeatures:
    """Frozen input embeddings of the base model for windows of tokens.

    tokens: int64, (n, t): the tokens the router may see, which under a prefix protocol are the first k.
    embedding: (vocabulary, dimension), any float type; shared, never copied.
    """

    def __init__(self, tokens: Tensor, embedding: Tensor, device: str = "cpu") -> None:
        self.tokens, self.embedding, self.device = tokens, embedding, device
        self.dimension = int(embedding.shape[1])
        self._pooled: Tensor | None = None

    def __len__(self) -> int:
        return int(self.tokens.shape[0])

    def batch(self, rows: Tensor) -> Tensor:
        """Embeddings of the samples at `rows`: float32, (b, t, dimension)."""
        return self.embedding[self.tokens[rows].to(self.embedding.device)].to(self.device).float()

    def pooled(self) -> Tensor:
        """Mean embedding of every sample: float32, (n, dimension)."""
        if self._pooled is None:
            import torch

            rows = torch.arange(len(self)).split(64)
            self._pooled = torch.cat([self.batch(part).mean(1) for part in rows])
        return self._pooled
