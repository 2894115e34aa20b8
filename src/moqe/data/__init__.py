"""Text to samples: sources, documents, windows, disjoint splits; and the protocols that score them."""

from __future__ import annotations

from moqe.data.documents import Document
from moqe.data.samples import Splits, TextSamples
from moqe.data.sources import read_source
from moqe.data.splits import make_splits, tokenizer_digest
from moqe.data.windows import pack_windows

__all__ = ["Document", "Splits", "TextSamples", "make_splits", "pack_windows", "read_source", "tokenizer_digest"]
