"""Protocols: which units of a sample are scored, and how their losses become the sample's loss.

`whole` scores every token that has one before it (or the whole image); `prefix-k` scores the tokens at positions k and
later, because a server that routes on the first k tokens has them in hand already. A protocol's digest stands beside
every loss, so that losses measured by different rules are never mixed. See docs/protocols.md.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moqe.data.samples import TextSamples
from moqe.errors import NumericalError, ProtocolError
from moqe.store import canonical_hash

WHOLE = "whole"


def prefix_protocol(tokens: int) -> str:
    """The name of the protocol that routes on the first `tokens` tokens and scores the rest."""
    return f"prefix-{tokens}"


def visible_tokens(protocol: str) -> int | None:
    """How many tokens of a sample the router sees under `protocol`; None means all. Raises ProtocolError."""
    if protocol == WHOLE:
        return None
    match = re.fullmatch(r"prefix-([1-9]\d*)", protocol)
    if match is None:
        raise ProtocolError(f"unknown protocol {protocol!r}: use 'whole' or 'prefix-<tokens>', for example prefix-64")
    return int(match.group(1))


def first_unit(protocol: str) -> int:
    """Index of the first unit whose loss counts. Unit j of a text is the prediction of the token at position j + 1."""
    return (visible_tokens(protocol) or 1) - 1


def protocol_digest(protocol: str, units: int) -> str:
    """16 hexadecimal digits that name the rule by which a sample of `units` losses is scored.

    Raises ProtocolError when the protocol is unknown or leaves nothing to score.
    """
    first = first_unit(protocol)
    if first >= units:
        raise ProtocolError(f"protocol {protocol} leaves nothing to score in a sample of {units} losses")
    return canonical_hash({"name": protocol, "units": units, "first_unit": first, "halves": "contiguous"})


@dataclass(frozen=True)
class SampleLosses:
    """Losses of n samples by one expert under one protocol.

    loss_sum: nats over the scored units; count: how many those are; first_half_sum, first_half_count: the same for
    the first half of the scored units (none where there is only one). All (n,).
    """

    loss_sum: NDArray[np.float64]
    count: NDArray[np.int64]
    first_half_sum: NDArray[np.float64]
    first_half_count: NDArray[np.int64]


@dataclass(frozen=True)
class Scored:
    """What an expert was found to do on n samples.

    losses: per protocol and metric. log_probabilities: of every class, float16 (n, classes), where samples have one
    true class; None where they have not.
    """

    losses: Mapping[str, Mapping[str, SampleLosses]]
    log_probabilities: NDArray[np.float16] | None = None


def reduce(unit_losses: Tensor, protocol: str) -> SampleLosses:
    """Sum the losses of units into losses of samples.

    unit_losses: (n, units), nats, any float type; for text, column j is the loss of predicting the token at position
    j + 1. Sums run in float64. Raises NumericalError on a loss that is not finite and ProtocolError when the protocol
    leaves nothing to score.
    """
    n, units = unit_losses.shape
    protocol_digest(protocol, units)  # refuses samples that are too short
    if not torch.isfinite(unit_losses).all():
        row = int((~torch.isfinite(unit_losses)).any(1).nonzero()[0])
        raise NumericalError(f"the loss of sample {row} of this batch is not finite: the expert's weights are damaged")
    scored = unit_losses[:, first_unit(protocol) :].to("cpu", torch.float64)  # (n, scored)
    half = scored.shape[1] // 2
    return SampleLosses(
        scored.sum(1).numpy(),
        np.full(n, scored.shape[1], np.int64),
        scored[:, :half].sum(1).numpy(),
        np.full(n, half, np.int64),
    )


def scored_bytes(samples: TextSamples, protocol: str, decode: Callable[[list[int]], str]) -> NDArray[np.int64]:
    """UTF-8 bytes of the text that `protocol` scores in every window, int64 (n,): the denominator of bits per byte.

    That is the window's bytes without those of the tokens before the first scored one. `decode` turns ids into text
    and drops special tokens. Where the cut falls inside a character the result is off by at most two bytes.
    """
    unscored = [len(decode(row[: first_unit(protocol) + 1]).encode()) for row in samples.tokens.tolist()]
    return np.maximum(np.asarray(samples.text_bytes, np.int64) - np.asarray(unscored, np.int64), 1)


@dataclass(frozen=True)
class SplitSamples:
    """What a loss table records about the samples of one split beside their losses.

    document, domain: n ids and labels. digest: the samples' identity. text_bytes: per protocol, the UTF-8 bytes of the
    scored text, int64 (n,), zero where there is none. protocol_digests: per protocol, the digest of its rule.
    label: the true class of each sample, int64 (n,); None where samples have none, and then no predictions are kept.
    """

    document: tuple[str, ...]
    domain: tuple[str, ...]
    digest: str
    text_bytes: Mapping[str, NDArray[np.int64]]
    protocol_digests: Mapping[str, str]
    label: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.document)


def describe_text(samples: TextSamples, protocols: Sequence[str], decode: Callable[[list[int]], str]) -> SplitSamples:
    """What a loss table records about windows of tokens. `decode` turns ids into text and drops special tokens."""
    units = int(samples.tokens.shape[1]) - 1
    return SplitSamples(
        samples.document,
        samples.domain,
        samples.digest,
        {protocol: scored_bytes(samples, protocol, decode) for protocol in protocols},
        {protocol: protocol_digest(protocol, units) for protocol in protocols},
    )
