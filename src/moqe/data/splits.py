"""The four disjoint sets of samples of a recipe: calibration, router training, router validation, test.

Disjoint means documents: the same text in two sets is an error, found by digest. The same text twice in one set counts
once.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from moqe.data.documents import Document
from moqe.data.samples import Splits, TextSamples
from moqe.data.sources import read_source
from moqe.data.windows import pack_windows
from moqe.errors import DataError
from moqe.recipe import Data, Source
from moqe.store import canonical_hash, digest_bytes

log = logging.getLogger("moqe")

# Letter cases, digits, spaces, indentation, accents, another script, an emoji: what tokenizers disagree about.
_PROBE = "The  year's 1,234.5 naïve ÜBER\n\tdef f(x): return x**2\n\n東京 🙂 don't"


def make_splits(data: Data, tokenizer: Any, seed: int) -> Splits:
    """Read a recipe's sources and pack them into the four sets of windows.

    A share of the router's documents, drawn by their digests, becomes the validation set. Raises DataError when a
    document is in two sets, when a domain has too few documents or tokens, and whatever `read_source` raises.
    """
    calibration = _distinct("calibration", data.calibration)
    router = _distinct("router", data.router)
    test = _distinct("test", data.test)
    _check_disjoint({"calibration": calibration, "router": router, "test": test})
    train, validation = split_documents(router, data.validation_share, seed)

    router_limit, validation_limit = data.router_samples, None
    if router_limit is not None:
        validation_limit = max(1, round(router_limit * data.validation_share))
        router_limit = max(1, router_limit - validation_limit)
    return Splits(
        _pack("calibration", calibration, tokenizer, data.window, data.calibration_samples, seed),
        _pack("router training", train, tokenizer, data.window, router_limit, seed),
        _pack("router validation", validation, tokenizer, data.window, validation_limit, seed),
        _pack("test", test, tokenizer, data.window, data.test_samples, seed),
    )


def split_documents(documents: Sequence[Document], share: float, seed: int) -> tuple[list[Document], list[Document]]:
    """Divide documents in two; the second part gets `share` of every domain's text, and at least one document.

    Documents are drawn in the order of a hash of seed and text; one that would exceed the share is passed over. Both
    parts keep the order of `documents`. Raises DataError when a domain has a single document.
    """
    drawn: set[str] = set()
    for domain in dict.fromkeys(document.domain for document in documents):
        group = [document for document in documents if document.domain == domain]
        if len(group) < 2:
            raise DataError(
                f"domain {domain!r} has one router document ({group[0].name}), and training and validation need one "
                "each: add documents, or cut the file into several with separator"
            )
        room = share * sum(len(document.text) for document in group)
        group.sort(key=lambda document: digest_bytes(f"{seed}:{document.digest}".encode()))
        fitting = []
        for document in group:
            if len(document.text) <= room:
                fitting.append(document)
                room -= len(document.text)
        drawn.update(document.digest for document in fitting or [min(group, key=lambda d: (len(d.text), d.digest))])
    return (
        [document for document in documents if document.digest not in drawn],
        [document for document in documents if document.digest in drawn],
    )


def tokenizer_digest(tokenizer: Any) -> str:
    """16 hexadecimal digits that name what a tokenizer does: its vocabulary and how it encodes a probe text.

    Equal for any two copies of one tokenizer, whatever their files, templates and padding are.
    """
    return canonical_hash({"vocabulary": tokenizer.get_vocab(), "probe": tokenizer(_PROBE)["input_ids"]})


def _distinct(kind: str, sources: Sequence[Source]) -> list[Document]:
    """The documents of all sources, each text once."""
    found: dict[str, Document] = {}
    for document in (document for source in sources for document in read_source(source)):
        first = found.setdefault(document.digest, document)
        if first is not document:
            log.warning("%s: %s repeats %s and is left out", kind, document.name, first.name)
    return list(found.values())


def _check_disjoint(kinds: dict[str, list[Document]]) -> None:
    seen: dict[str, tuple[str, Document]] = {}
    for kind, documents in kinds.items():
        for document in documents:
            other, first = seen.setdefault(document.digest, (kind, document))
            if other != kind:
                raise DataError(
                    f"one document is in two splits: {first.name} ({other}) and {document.name} ({kind}) have the same "
                    "text; remove one, or take different ranges with skip_documents and max_documents"
                )


def _pack(
    kind: str, documents: Sequence[Document], tokenizer: Any, window: int, limit: int | None, seed: int
) -> TextSamples:
    try:
        return pack_windows(documents, tokenizer, window, limit, seed)
    except DataError as error:
        raise DataError(f"{kind} data: {error}") from None
