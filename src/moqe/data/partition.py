"""Which documents belong to which set: each content once, none in two sets, a set divided in two, an even choice.

Texts and images share this file. A document is whatever has a digest of its content, a domain, a name and a size.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol, TypeVar

import numpy as np

from moqe.errors import DataError
from moqe.store import digest_bytes

log = logging.getLogger("moqe")


class Divisible(Protocol):
    """A text or an image, as far as splits are concerned."""

    @property
    def digest(self) -> str:
        """Names the content: equal digests mean the same document."""

    @property
    def domain(self) -> str:
        """The label whose documents are divided by themselves."""

    @property
    def name(self) -> str:
        """Where the document came from, for messages."""

    @property
    def size(self) -> int:
        """How much of its domain the document is: characters of a text, 1 for an image."""


D = TypeVar("D", bound=Divisible)


def distinct(kind: str, documents: Iterable[D]) -> list[D]:
    """The documents of the set `kind` in their order, each content once; a repetition is logged and left out."""
    found: dict[str, D] = {}
    for document in documents:
        first = found.setdefault(document.digest, document)
        if first is not document:
            log.warning("%s: %s repeats %s and is left out", kind, document.name, first.name)
    return list(found.values())


def check_disjoint(kinds: Mapping[str, Sequence[Divisible]], content: str = "text") -> None:
    """Raise DataError when the same content, called `content` in the message, is in two of the sets."""
    seen: dict[str, tuple[str, Divisible]] = {}
    for kind, documents in kinds.items():
        for document in documents:
            other, first = seen.setdefault(document.digest, (kind, document))
            if other != kind:
                raise DataError(
                    f"one document is in two splits: {first.name} ({other}) and {document.name} ({kind}) have the same "
                    f"{content}; remove one, or take different ranges with skip_documents and max_documents"
                )


def split_documents(documents: Sequence[D], share: float, seed: int) -> tuple[list[D], list[D]]:
    """Divide documents in two; the second part gets `share` of every domain's size, and at least one document.

    Documents are drawn in the order of a hash of seed and content; one that would exceed the share is passed over. Both
    parts keep the order of `documents`. Raises DataError when a domain has a single document.
    """
    by_domain: dict[str, list[D]] = {}
    for document in documents:
        by_domain.setdefault(document.domain, []).append(document)
    drawn: set[str] = set()
    for domain, group in by_domain.items():
        if len(group) < 2:
            raise DataError(
                f"domain {domain!r} has one router document ({group[0].name}), and training and validation need one "
                "each: add documents, or cut the file into several with separator"
            )
        room = share * sum(document.size for document in group)
        group.sort(key=lambda document: digest_bytes(f"{seed}:{document.digest}".encode()))
        fitting = []
        for document in group:
            if document.size <= room:
                fitting.append(document)
                room -= document.size
        drawn.update(document.digest for document in fitting or [min(group, key=lambda d: (d.size, d.digest))])
    return (
        [document for document in documents if document.digest not in drawn],
        [document for document in documents if document.digest in drawn],
    )


def router_limits(samples: int | None, validation_share: float) -> tuple[int | None, int | None]:
    """How many of `samples` router samples are for training and for validation, at least one each; None takes all."""
    if samples is None:
        return None, None
    validation = max(1, round(samples * validation_share))
    return max(1, samples - validation), validation


def spread(units: Sequence[tuple[str, str]], wanted: int, seed: int) -> list[int]:
    """Rows of `units`, (domain, document), chosen evenly over domains, then over documents; sorted.

    A domain or document with fewer samples than its share gives the rest to the others.
    """
    generator = np.random.default_rng(seed)
    by_domain: dict[str, dict[str, list[int]]] = {}
    for row in generator.permutation(len(units)).tolist():
        domain, document = units[row]
        by_domain.setdefault(domain, {}).setdefault(document, []).append(row)
    queues = {domain: _take_turns(list(packs.values())) for domain, packs in sorted(by_domain.items())}
    return sorted(_take_turns(list(queues.values()))[:wanted])


def _take_turns(queues: Sequence[Sequence[int]]) -> list[int]:
    """One item of each queue in turn until all are empty."""
    longest = max(map(len, queues))
    return [queue[turn] for turn in range(longest) for queue in queues if turn < len(queue)]
