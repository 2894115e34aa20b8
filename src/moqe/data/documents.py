"""A document: the unit that belongs to one split and is resampled as a whole."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from moqe.store import digest_bytes


@dataclass(frozen=True)
class Document:
    """One text of one domain. `name` says where it came from (file and position), for messages and the loss table."""

    text: str
    domain: str
    name: str

    @cached_property
    def digest(self) -> str:
        """First 16 hexadecimal digits of the SHA-256 of the UTF-8 text: equal texts are the same document."""
        return digest_bytes(self.text.encode("utf-8"))[:16]

    @property
    def size(self) -> int:
        """Characters of the text."""
        return len(self.text)
