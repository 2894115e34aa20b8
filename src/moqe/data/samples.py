"""Samples: what a router routes and a protocol scores. For language, windows of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moqe.store import digest_bytes


@dataclass(frozen=True)
class TextSamples:
    """Windows of tokens, packed without padding.

    tokens: int64, (n, window). document: n ids of the unit that is resampled (a document, or the short documents that
    were packed together). domain: n labels. text_bytes: n UTF-8 lengths of the windows' text, for bits per byte.
    """

    tokens: Tensor
    document: tuple[str, ...]
    domain: tuple[str, ...]
    text_bytes: tuple[int, ...]

    def __len__(self) -> int:
        return int(self.tokens.shape[0])

    @property
    def digest(self) -> str:
        """SHA-256 over the token ids, 16 hexadecimal digits: equal digests mean equal samples in equal order."""
        content = np.ascontiguousarray(self.tokens.numpy().astype("<i8")).tobytes()
        return digest_bytes(repr(tuple(self.tokens.shape)).encode() + content)[:16]

    def select(self, rows: Sequence[int]) -> TextSamples:
        """The samples at the given rows, in that order."""
        return TextSamples(
            self.tokens[torch.as_tensor(list(rows), dtype=torch.int64)],
            tuple(self.document[i] for i in rows),
            tuple(self.domain[i] for i in rows),
            tuple(self.text_bytes[i] for i in rows),
        )

    def spread(self, count: int | None) -> list[int]:
        """Rows of at most `count` samples, as many of every domain as it has, evenly apart in it; all for None."""
        if count is None or count >= len(self):
            return list(range(len(self)))
        rows_of: dict[str, list[int]] = {}
        for row, name in enumerate(self.domain):
            rows_of.setdefault(name, []).append(row)
        left, found = count, list[int]()
        for place, rows in enumerate(sorted(rows_of.values(), key=len)):  # what a small domain leaves, others take
            share = min(len(rows), left // (len(rows_of) - place))
            left -= share
            found += [rows[index * len(rows) // share] for index in range(share)]
        return sorted(found)


@dataclass(frozen=True)
class Splits:
    """The four disjoint sets of samples. Test is read by evaluation only."""

    calibration: TextSamples
    router_train: TextSamples
    router_validation: TextSamples
    test: TextSamples
