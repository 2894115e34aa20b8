"""Answers timed so that other work on the machine falls on all contestants alike: they take turns by the request."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moqe.progress import Advance, ignore


@dataclass(frozen=True)
class Contestant:
    """Something that answers requests, by their number.

    kind: expert, router or mixture. runtime: what computes. answer: answers a request whole and says how many tokens it
    made, 0 where an answer has none. first: makes the first token of an answer only; None where there are no tokens.
    """

    name: str
    kind: str
    runtime: str
    answer: Callable[[int], int]
    first: Callable[[int], object] | None = None


@dataclass(frozen=True)
class Percentiles:
    """Seconds that half, nine in ten and 99 in 100 of `n` answers took at most, interpolated between neighbours."""

    p50: float
    p90: float
    p99: float
    n: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Percentiles:
        """The percentiles of at least one time."""
        p50, p90, p99 = (float(value) for value in np.percentile(seconds, (50, 90, 99)))
        return cls(p50, p90, p99, len(seconds))


@dataclass(frozen=True)
class Times:
    """Of one contestant: seconds of each answer, tokens in each, seconds to each first token (none without tokens)."""

    answers: tuple[float, ...]
    tokens: tuple[int, ...]
    firsts: tuple[float, ...]

    @property
    def first_token(self) -> Percentiles | None:
        """Seconds to the first token."""
        return Percentiles.of(self.firsts) if self.firsts else None

    @property
    def decode_rate(self) -> float | None:
        """Tokens a second after the first one, over all answers; None where no answer has a second token."""
        made = sum(max(0, count - 1) for count in self.tokens)
        seconds = sum(self.answers) - sum(self.firsts)
        return made / seconds if self.firsts and made and seconds > 0 else None

    def prefill_rate(self, prompt_tokens: int) -> float | None:
        """Tokens of the prompt a second, up to the first token of the answer, by the median request."""
        return prompt_tokens / float(np.median(self.firsts)) if self.firsts else None


def take_turns(contestants: Sequence[Contestant], requests: int, advance: Advance = ignore) -> list[Times]:
    """The times of every contestant over `requests` requests, one unmeasured answer of each before.

    Everybody answers request i before anybody answers request i + 1; the order is reversed from one to the next, so
    that nobody always follows the same neighbour. `advance` is told of every answer.
    """
    for contestant in contestants:
        contestant.answer(0)  # loads weights, touches pages, starts threads
        if contestant.first is not None:
            contestant.first(0)
        advance(1)
    found: list[tuple[list[float], list[int], list[float]]] = [([], [], []) for _ in contestants]
    for request in range(requests):
        turns = list(zip(contestants, found, strict=True))
        for contestant, (answers, tokens, firsts) in turns if request % 2 == 0 else reversed(turns):
            seconds, made = _timed(contestant.answer, request)
            answers.append(seconds)
            tokens.append(made)
            if contestant.first is not None:
                firsts.append(_timed(contestant.first, request)[0])
            advance(1)
    return [Times(tuple(answers), tuple(tokens), tuple(firsts)) for answers, tokens, firsts in found]


def _timed(call: Callable[[int], Any], request: int) -> tuple[float, Any]:
    start = time.perf_counter()
    result = call(request)
    return time.perf_counter() - start, result
