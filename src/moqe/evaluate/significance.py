"""Significance: how far a difference could be due to the documents that happened to be in the test set.

Windows of one document resemble each other, so documents are resampled, not windows (cluster bootstrap). Statistics
are ratios of sums, sum of losses over sum of tokens, recomputed in every resample. A seed gives the same resamples in
every call, so intervals of several quantities are paired.

Percentile intervals are somewhat too narrow below about 20 documents; below MINIMUM_DOCUMENTS nothing is claimed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from moqe.evaluate.loss_table import Floats

CONFIDENCE = 0.95
MINIMUM_DOCUMENTS = 6  # with fewer pairs no two-sided signed-rank test can reach p < 0.05
_BLOCK = 256  # resamples drawn at a time, to bound memory
_REMEMBERED = 2**24  # draws of one resampling that are kept for the next call, 64 MiB


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % bootstrap interval.

    low and high are None when there are fewer than two documents to resample; p is that of a difference, and None for a
    value that is none or that no test fits (see `paired_intervals`).
    """

    value: float
    low: float | None
    high: float | None
    p: float | None
    n_documents: int
    n_samples: int

    def excludes_zero(self) -> bool:
        """Whether the whole interval lies on one side of zero and rests on enough documents to say so."""
        if self.low is None or self.high is None or self.n_documents < MINIMUM_DOCUMENTS:
            return False
        return self.low > 0 or self.high < 0


def document_sums(document: NDArray[np.str_], values: Floats) -> Floats:
    """Sum the rows of `values`, (n, k), over documents: (documents, k), documents in sorted order."""
    names, index = np.unique(document, return_inverse=True)
    sums = np.zeros((len(names), values.shape[1]))
    np.add.at(sums, index, values)
    return sums


def resampled_ratios(
    document: NDArray[np.str_], numerators: Floats, denominator: Floats, resamples: int, seed: int
) -> Floats:
    """Ratios sum(numerator) / sum(denominator) in bootstrap resamples of documents.

    document: (n,). numerators: (n, k). denominator: (n,), positive. Returns (resamples, k). Column j of two calls with
    the same documents, resamples and seed come from the same draws.
    """
    sums = document_sums(document, np.concatenate([numerators, denominator[:, None]], axis=1))
    ratios = np.empty((resamples, numerators.shape[1]))
    start = 0
    for drawn in _resamples(len(sums), resamples, seed):
        # einsum and not BLAS: the order of additions, hence the last bit, must not depend on the number of threads
        totals = np.einsum("bd,dk->bk", drawn.astype(np.float64), sums, optimize=False)
        ratios[start : start + len(drawn)] = totals[:, :-1] / totals[:, -1:]
        start += len(drawn)
    return ratios


def _resamples(n: int, resamples: int, seed: int) -> Iterable[NDArray[np.uint32]]:
    """How often each of n documents is in each resample, in blocks of resamples: (block, n)."""
    return _remembered(n, resamples, seed) if n * resamples <= _REMEMBERED else _draw(n, resamples, seed)


def _draw(n: int, resamples: int, seed: int) -> Iterator[NDArray[np.uint32]]:
    generator = np.random.default_rng(seed)
    for start in range(0, resamples, _BLOCK):
        size = min(_BLOCK, resamples - start)
        yield generator.multinomial(n, np.full(n, 1 / n), size=size).astype(np.uint32)


@lru_cache(maxsize=1)  # drawing takes most of the time, and a verdict resamples the same documents several times
def _remembered(n: int, resamples: int, seed: int) -> tuple[NDArray[np.uint32], ...]:
    return tuple(_draw(n, resamples, seed))


def percentile_interval(resampled: Floats) -> tuple[float, float]:
    """The central 95 % of some resampled values, (resamples,)."""
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return float(low), float(high)


def intervals(
    document: NDArray[np.str_],
    numerators: Floats,
    denominator: Floats,
    resamples: int,
    seed: int,
    *,
    differences: bool = False,
) -> list[Interval]:
    """One Interval per column of `numerators`, (n, k), each a sum over `denominator`'s sum.

    differences: the columns are paired differences, so each also gets a Wilcoxon p over documents.
    """
    n_documents, n_samples = len(np.unique(document)), len(document)
    values = numerators.sum(0) / denominator.sum()
    ranges: list[tuple[float | None, float | None]] = [(None, None)] * numerators.shape[1]
    if n_documents >= 2:
        resampled = resampled_ratios(document, numerators, denominator, resamples, seed)
        ranges = [percentile_interval(column) for column in resampled.T]
    p_values: list[float | None] = [None] * numerators.shape[1]
    if differences:
        sums = document_sums(document, np.concatenate([numerators, denominator[:, None]], axis=1))
        p_values = [wilcoxon(column) for column in (sums[:, :-1] / sums[:, -1:]).T]
    return [
        Interval(float(value), low, high, p, n_documents, n_samples)
        for value, (low, high), p in zip(values, ranges, p_values, strict=True)
    ]


def paired_intervals(
    document: NDArray[np.str_],
    values: Floats,
    reference: Floats,
    denominator: Floats,
    resamples: int,
    seed: int,
    *,
    binary: bool,
) -> list[Interval]:
    """The paired difference of every column of `values`, (n, k), to `reference`, (n,): interval and p.

    p is Wilcoxon's over documents. Where samples are `binary`, right or wrong, and each is a document of its own, it is
    McNemar's; a column of expected values, which are neither, has none then.
    """
    each_alone = binary and len(np.unique(document)) == len(document)
    changes = values - reference[:, None]
    found = intervals(document, changes, denominator, resamples, seed, differences=not each_alone)
    if not each_alone:
        return found
    return [
        replace(interval, p=mcnemar(reference == 1, column == 1) if _is_binary(column) else None)
        for interval, column in zip(found, values.T, strict=True)
    ]


def _is_binary(values: Floats) -> bool:
    return bool(((values == 0) | (values == 1)).all())


def wilcoxon(differences: Floats) -> float:
    """Two-sided Wilcoxon signed-rank p of paired differences, (n,), without the zeros; none left is 1."""
    nonzero = differences[differences != 0]
    if len(nonzero) == 0:
        return 1.0
    return float(stats.wilcoxon(nonzero).pvalue)


def mcnemar(first_correct: NDArray[np.bool_], second_correct: NDArray[np.bool_]) -> float:
    """Exact two-sided McNemar p for two classifiers on the same images, (n,) each; no disagreement is 1."""
    only_first = int(np.sum(first_correct & ~second_correct))
    only_second = int(np.sum(~first_correct & second_correct))
    if only_first + only_second == 0:
        return 1.0
    return float(stats.binomtest(only_first, only_first + only_second, 0.5).pvalue)
