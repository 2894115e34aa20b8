"""Timing that other jobs on the machine do not spoil: contestants take turns, and ratios are made within a round."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

_DRAWS = 10_000


@dataclass(frozen=True)
class Spread:
    """Median, smallest and largest of some rounds, or the ends of an interval."""

    median: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        """The spread of at least one value."""
        return cls(statistics.median(values), min(values), max(values))

    @classmethod
    def of_median(cls, values: list[float], seed: int = 0) -> Spread:
        """The median with its 95 % bootstrap interval, for many values of which each is noisy."""
        draws = np.random.default_rng(seed).choice(values, (_DRAWS, len(values)))
        low, high = np.quantile(np.median(draws, axis=1), [0.025, 0.975])
        return cls(statistics.median(values), float(low), float(high))

    def interval(self, digits: int = 2) -> str:
        """Such as `1.05 [1.03, 1.09]`, of `of_median`."""
        return f"{self.median:.{digits}f} [{self.lowest:.{digits}f}, {self.highest:.{digits}f}]"

    def text(self, digits: int = 2) -> str:
        """Such as `1.05 (1.03 to 1.09)`."""
        return f"{self.median:.{digits}f} ({self.lowest:.{digits}f} to {self.highest:.{digits}f})"


def seconds_per_round(
    contestants: Mapping[str, Callable[[], object]], rounds: int, seconds_per_turn: float
) -> dict[str, list[float]]:
    """Seconds of one call of each contestant in each round.

    In a round each contestant is called, by turns, until its calls have taken about `seconds_per_turn`. The order is
    reversed from round to round, so that nobody always follows the same neighbour.
    """
    calls = {}
    for name, call in contestants.items():
        call()  # caches, pages, thread pools
        start = time.perf_counter()
        call()
        calls[name] = max(1, round(seconds_per_turn / (time.perf_counter() - start)))
    found: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds):
        for name, call in list(contestants.items())[:: 1 if turn % 2 == 0 else -1]:
            start = time.perf_counter()
            for _ in range(calls[name]):
                call()
            found[name].append((time.perf_counter() - start) / calls[name])
    return found


def ratios(over: list[float], under: list[float]) -> Spread:
    """Round by round, how many times longer `over` took than `under`."""
    return Spread.of(pairwise(over, under))


def pairwise(over: list[float], under: list[float]) -> list[float]:
    """The ratio of each round."""
    return [first / second for first, second in zip(over, under, strict=True)]
