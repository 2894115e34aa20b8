"""The four disjoint sets of samples of a recipe: calibration, router training, router validation, test.

Disjoint means documents: the same text in two sets is an error, found by digest. The same text twice in one set counts
once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from moqe.data.documents import Document
from moqe.data.partition import check_disjoint, distinct, router_limits, split_documents
from moqe.data.samples import Splits, TextSamples
from moqe.data.sources import read_source
from moqe.data.windows import pack_windows
from moqe.errors import DataError
from moqe.progress import Advance, Progress, Silent
from moqe.recipe import Data, Source
from moqe.store import canonical_hash

# Letter cases, digits, spaces, indentation, accents, another script, an emoji: what tokenizers disagree about.
_PROBE = "The  year's 1,234.5 naïve ÜBER\n\tdef f(x): return x**2\n\n東京 🙂 don't"


def make_splits(data: Data, tokenizer: Any, seed: int, progress: Progress | None = None) -> Splits:
    """Read a recipe's sources and pack them into the four sets of windows.

    A share of the router's documents, drawn by their digests, becomes the validation set. Raises DataError when a
    document is in two sets, when a domain has too few documents or tokens, and whatever `read_source` raises.
    """
    shown = progress or Silent()
    with shown.track("read texts", len(data.calibration) + len(data.router) + len(data.test)) as source_read:
        calibration = distinct("calibration", _read(data.calibration, source_read))
        router = distinct("router", _read(data.router, source_read))
        test = distinct("test", _read(data.test, source_read))
    check_disjoint({"calibration": calibration, "router": router, "test": test})
    train, validation = split_documents(router, data.validation_share, seed)
    router_limit, validation_limit = router_limits(data.router_samples, data.validation_share)
    with shown.track("cut texts into windows", len(calibration) + len(router) + len(test)) as cut:
        return Splits(
            _pack("calibration", calibration, tokenizer, data.window, data.calibration_samples, seed, cut),
            _pack("router training", train, tokenizer, data.window, router_limit, seed, cut),
            _pack("router validation", validation, tokenizer, data.window, validation_limit, seed, cut),
            _pack("test", test, tokenizer, data.window, data.test_samples, seed, cut),
        )


def tokenizer_digest(tokenizer: Any) -> str:
    """16 hexadecimal digits that name what a tokenizer does: its vocabulary and how it encodes a probe text.

    Equal for any two copies of one tokenizer, whatever their files, templates and padding are.
    """
    return canonical_hash({"vocabulary": tokenizer.get_vocab(), "probe": tokenizer(_PROBE)["input_ids"]})


def _read(sources: Sequence[Source], source_read: Advance) -> Iterator[Document]:
    """The documents of all sources, in their order."""
    for source in sources:
        yield from read_source(source)
        source_read(1)


def _pack(
    kind: str,
    documents: Sequence[Document],
    tokenizer: Any,
    window: int,
    limit: int | None,
    seed: int,
    documents_done: Advance,
) -> TextSamples:
    try:
        return pack_windows(documents, tokenizer, window, limit, seed, documents_done)
    except DataError as error:
        raise DataError(f"{kind} data: {error}") from None
