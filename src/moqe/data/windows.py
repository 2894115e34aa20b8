"""Documents become windows of tokens: packed, never padded.

Short documents of one domain are laid end to end, an end-of-text token between them, until they fill at least one
window; such a *pack* consists of whole documents and is the unit that is resampled. A document that fills a window by
itself is a pack of its own. Each pack is cut into windows and its tail is dropped.

Where the tokenizer's own encoding puts a beginning-of-text token in front, every window begins with exactly that one
and holds `window - 1` tokens of text. Special tokens that a document spells out are encoded as ordinary text.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moqe.data.documents import Document
from moqe.data.partition import spread
from moqe.data.samples import TextSamples
from moqe.errors import DataError
from moqe.progress import Advance, ignore
from moqe.store import canonical_hash

log = logging.getLogger("moqe")

_ENCODED_TOGETHER = 64  # documents handed to the tokenizer at once


@dataclass(frozen=True)
class Pack:
    """Whole documents of one domain, end to end: ids of the text only, at least one window of them."""

    documents: tuple[str, ...]
    domain: str
    ids: tuple[int, ...]

    @property
    def name(self) -> str:
        """The digest of the document, or of the list of digests where there are several."""
        return self.documents[0] if len(self.documents) == 1 else canonical_hash(self.documents)


def pack_windows(
    documents: Sequence[Document],
    tokenizer: Any,
    window: int,
    max_samples: int | None = None,
    seed: int = 0,
    advance: Advance = ignore,
) -> TextSamples:
    """Cut documents into windows of `window` tokens, (n, window).

    Domains come in the order of their first document, and inside a domain documents keep their order. With
    `max_samples` the windows are spread evenly over domains and, inside a domain, over packs: documents are taken in an
    order drawn with `seed`, no more of them than that needs. `advance` is told how many documents are done, all of them
    in the end. Raises DataError when the documents of a domain do not fill a window.
    """
    begin = begin_token(tokenizer)
    body = window - len(begin)
    eos = tokenizer.eos_token_id
    grouped: dict[str, list[Document]] = {}
    for document in documents:
        grouped.setdefault(document.domain, []).append(document)
    if not grouped:
        raise DataError(f"there are no documents, and one window needs {body:,} tokens")

    waiting = len(documents)

    def tokenized(group: int) -> None:
        nonlocal waiting
        waiting -= group
        advance(group)

    packs: list[Pack] = []
    for domain, members in grouped.items():
        if max_samples is not None:
            members = [members[i] for i in np.random.default_rng(seed).permutation(len(members)).tolist()]
        encoded = _encode(members, tokenizer, tokenized)
        found = list(islice(_packs(encoded, domain, body, [] if eos is None else [eos]), max_samples))
        if not found:
            tokens = sum(len(ids) for _, ids in _encode(members, tokenizer))
            raise DataError(
                f"domain {domain!r} has {tokens:,} tokens in {len(members)} documents, and one window needs {body:,}: "
                "add documents or lower data.window"
            )
        packs += found

    cuts = [(pack, start) for pack in packs for start in range(0, len(pack.ids) - body + 1, body)]
    if max_samples is not None and max_samples < len(cuts):
        cuts = [cuts[i] for i in spread([(pack.domain, pack.name) for pack, _ in cuts], max_samples, seed)]
    advance(waiting)  # those that the limit leaves out
    windows = torch.tensor([[*begin, *pack.ids[start : start + body]] for pack, start in cuts], dtype=torch.int64)
    return TextSamples(
        windows,
        tuple(pack.name for pack, _ in cuts),
        tuple(pack.domain for pack, _ in cuts),
        text_bytes(windows, tokenizer),
    )


def begin_token(tokenizer: Any) -> list[int]:
    """The beginning-of-text token if the tokenizer's own encoding adds it, else nothing."""
    bos = tokenizer.bos_token_id
    encoded = tokenizer("a")["input_ids"]
    return [bos] if bos is not None and encoded and encoded[0] == bos else []


def encode(text: str, tokenizer: Any) -> Tensor:
    """Token ids of a text, int64 (tokens,), that begin as windows do and end with the text.

    What a tokenizer would append, such as an end-of-text token, is left out, as it is in windows. Special tokens that
    the text spells out are special here, for texts that a chat template wrote, and ordinary text in windows.
    """
    ids = [*begin_token(tokenizer), *tokenizer(text, add_special_tokens=False)["input_ids"]]
    return torch.tensor(ids, dtype=torch.int64)


def text_bytes(tokens: Tensor, tokenizer: Any) -> tuple[int, ...]:
    """UTF-8 bytes of the text that each row of tokens, (n, t), decodes to; special tokens count nothing.

    A character cut in two by a window's edge decodes to a replacement character, which counts three bytes.
    """
    texts = tokenizer.batch_decode(tokens.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return tuple(len(text.encode("utf-8")) for text in texts)


def _encode(
    documents: Sequence[Document], tokenizer: Any, advance: Advance = ignore
) -> Iterator[tuple[str, list[int]]]:
    """(digest, ids) of every document, a few documents ahead of need."""
    for first in range(0, len(documents), _ENCODED_TOGETHER):
        group = documents[first : first + _ENCODED_TOGETHER]
        encoded = tokenizer(
            [document.text for document in group],
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            verbose=False,
        )["input_ids"]
        advance(len(group))
        yield from zip((document.digest for document in group), encoded, strict=True)


def _packs(encoded: Iterable[tuple[str, list[int]]], domain: str, body: int, separator: list[int]) -> Iterator[Pack]:
    """Group a domain's documents, (digest, ids), into packs of at least `body` tokens; what is left over is dropped."""
    names: list[str] = []
    gathered: list[int] = []
    for name, ids in encoded:
        if len(ids) >= body:
            yield Pack((name,), domain, tuple(ids))
            continue
        if not ids:
            continue
        gathered += [*(separator if names else []), *ids]
        names.append(name)
        if len(gathered) >= body:
            yield Pack(tuple(names), domain, tuple(gathered))
            names, gathered = [], []
    if gathered:
        log.debug("domain %s: %d tokens in %d documents fill no window", domain, len(gathered), len(names))
