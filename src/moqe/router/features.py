"""What a router sees of a sample: a sequence of vectors (text), one vector (images), and their mean."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from moqe.errors import DataError


class Features(Protocol):
    """Router inputs of n samples, made on demand so that they never have to be in memory all at once."""

    dimension: int

    def __len__(self) -> int: ...

    def batch(self, rows: Tensor) -> Tensor:
        """Features of the samples at `rows`, int64 (b,): float32, (b, tokens, dimension) or (b, dimension)."""

    def pooled(self) -> Tensor:
        """One vector per sample: float32, (n, dimension); the mean over tokens where there are tokens."""

    @property
    def length(self) -> int | None:
        """Tokens of every sample; None where a sample is one vector."""

    def first(self, tokens: int | None) -> Features:
        """The same samples seen by their first tokens alone; vectors are as they are."""


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
            rows = torch.split(torch.arange(len(self)), 64)
            self._pooled = torch.cat([self.batch(part).mean(1) for part in rows])
        return self._pooled

    @property
    def length(self) -> int:
        """Tokens of every sample."""
        return int(self.tokens.shape[1])

    def first(self, tokens: int | None) -> TokenFeatures:
        """As in `Features`."""
        return self if tokens == self.length else TokenFeatures(self.tokens[:, :tokens], self.embedding, self.device)


class VectorFeatures:
    """One vector per sample, such as what a network's stem or penultimate layer makes of an image.

    vectors: (n, dimension), any float type, all in memory. Raises DataError when they are not a matrix.
    """

    def __init__(self, vectors: Tensor, device: str = "cpu") -> None:
        if vectors.dim() != 2:
            raise DataError(f"features of shape {tuple(vectors.shape)} are not one vector per sample: pool them first")
        self.vectors, self.device = vectors, device
        self.dimension = int(vectors.shape[1])

    def __len__(self) -> int:
        return int(self.vectors.shape[0])

    def batch(self, rows: Tensor) -> Tensor:
        """Vectors of the samples at `rows`: float32, (b, dimension)."""
        return self.vectors[rows.to(self.vectors.device)].to(self.device).float()

    def pooled(self) -> Tensor:
        """The vectors: float32, (n, dimension)."""
        return self.vectors.to(self.device).float()

    @property
    def length(self) -> None:
        """As in `Features`."""
        return None

    def first(self, tokens: int | None) -> VectorFeatures:
        """As in `Features`."""
        return self


class SelectedFeatures:
    """The samples at `rows`, int64 (m,), of other features, as a view."""

    def __init__(self, features: Features, rows: Tensor) -> None:
        self.features, self.rows = features, rows
        self.dimension = features.dimension

    def __len__(self) -> int:
        return int(self.rows.shape[0])

    def batch(self, rows: Tensor) -> Tensor:
        """As in `Features`, with `rows` counted in the selection."""
        return self.features.batch(self.rows[rows])

    def pooled(self) -> Tensor:
        """As in `Features`."""
        return self.features.pooled()[self.rows]

    @property
    def length(self) -> int | None:
        """As in `Features`."""
        return self.features.length

    def first(self, tokens: int | None) -> SelectedFeatures:
        """As in `Features`."""
        return SelectedFeatures(self.features.first(tokens), self.rows)


class JoinedFeatures:
    """The samples of `first` followed by those of `second`, as a view; both must make features of one shape.

    Raises DataError when the dimensions or the tokens of a sample differ.
    """

    def __init__(self, first: Features, second: Features) -> None:
        if first.dimension != second.dimension:
            raise DataError(
                f"features of dimension {first.dimension} and {second.dimension} cannot be joined: "
                "make both from the same base model"
            )
        if first.length != second.length:
            raise DataError(f"samples of {first.length} and {second.length} tokens cannot be joined: cut them alike")
        self._first, self._second = first, second
        self.dimension = first.dimension

    def __len__(self) -> int:
        return len(self._first) + len(self._second)

    def batch(self, rows: Tensor) -> Tensor:
        """As in `Features`, with the rows of `second` counted after those of `first`."""
        border = len(self._first)
        in_first = rows < border
        if bool(in_first.all()):
            return self._first.batch(rows)
        if not bool(in_first.any()):
            return self._second.batch(rows - border)
        parts = torch.cat([self._first.batch(rows[in_first]), self._second.batch(rows[~in_first] - border)])
        # Positions in `rows` of the concatenated parts; its inverse puts them back into the order asked for.
        positions = torch.cat([in_first.nonzero().flatten(), (~in_first).nonzero().flatten()])
        return parts[positions.argsort().to(parts.device)]

    def pooled(self) -> Tensor:
        """As in `Features`."""
        return torch.cat([self._first.pooled(), self._second.pooled()])

    @property
    def length(self) -> int | None:
        """As in `Features`."""
        return self._first.length

    def first(self, tokens: int | None) -> JoinedFeatures:
        """As in `Features`."""
        return JoinedFeatures(self._first.first(tokens), self._second.first(tokens))
