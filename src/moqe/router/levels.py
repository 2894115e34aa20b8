"""What counts as novel depends on how much of a sample is seen: levels for samples shorter than those of training.

A router is trained on the first k tokens of a text, and asked about prompts of any length. The mean of fewer embeddings
scatters more, so that a short prompt lies far from everything, whatever it is about, and a classifier that was fitted
to means of k tokens is too sure of itself. Both are measured on the validation documents, cut to k/2, k/4, ... tokens,
4 at least: the distance that the given share of them keeps within, and the temperature by which the classifier's
log-probabilities must be divided to give their domains the highest likelihood (Guo et al. 2017, arXiv 1706.04599). At k
itself the temperature is 1. Between two lengths both are linear in the logarithm of the length; beyond, they are those
of the nearest. A shorter sample is held to no lower distance and no lower temperature than a longer one.

What that is worth is measured by `python -m benchmarks.specialists` (docs/results.md, "Shorter prompts"): of the gain
that 64 tokens bring, 16 keep most, where without this nearly every text of 16 tokens counted as novel. The price: an
unknown kind is noticed less often by its first words than by 64 tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor, nn

SHORTEST = 4  # tokens: fewer say too little for a level of their own
_HOTTEST = 32.0


@dataclass(frozen=True)
class Level:
    """What holds for samples of `length` tokens; None where a sample is one vector.

    threshold: the novelty beyond which a sample is novel. temperature: 1 or more, divides the log-probabilities of the
    classifier of domains.
    """

    length: int | None
    threshold: float
    temperature: float = 1.0

    def to_json(self) -> list[Any]:
        """For files; `Level(*...)` reads it again."""
        return [self.length, self.threshold, self.temperature]


def lengths(longest: int | None) -> list[int | None]:
    """Lengths for which there is a level, longest first: halves, down to SHORTEST."""
    found = [longest]
    while longest is not None and longest // 2 >= SHORTEST:
        longest //= 2
        found.append(longest)
    return found


def fit_levels(longest: int | None, measure: Callable[[int | None], tuple[float, float]]) -> tuple[Level, ...]:
    """A level for every length, longest first. measure: threshold and temperature that a length has by itself."""
    found: list[Level] = []
    for length in lengths(longest):
        threshold, temperature = measure(length)
        if found:
            threshold = max(threshold, found[-1].threshold)
            temperature = max(temperature, found[-1].temperature)
        found.append(Level(length, threshold, temperature))
    return tuple(found)


def level_at(levels: Sequence[Level], length: int | None) -> Level:
    """The level of a length, from levels that begin with the longest."""
    if length is None or levels[0].length is None or length >= levels[0].length:
        return levels[0]
    for longer, shorter in pairwise(levels):
        assert longer.length is not None
        assert shorter.length is not None
        if length >= shorter.length:
            share = math.log(length / shorter.length) / math.log(longer.length / shorter.length)

            def between(low: float, high: float, share: float = share) -> float:
                return low + share * (high - low)

            return Level(
                length,
                between(shorter.threshold, longer.threshold),
                between(shorter.temperature, longer.temperature),
            )
    return levels[-1]


def best_temperature(probabilities: Tensor, truth: Tensor) -> float:
    """The temperature, 1 or more, under which the labels `truth`, int64 (n,), of n samples are most likely.

    probabilities: (n, labels). 1 where there are no samples.
    """
    if not len(truth):
        return 1.0
    scores, truth = probabilities.double().clamp_min(1e-12).log().cpu(), truth.cpu()

    def cost(logarithm: float) -> float:
        return float(nn.functional.cross_entropy(scores / math.exp(logarithm), truth))

    found = float(minimize_scalar(cost, bounds=(0.0, math.log(_HOTTEST)), method="bounded").x)
    return math.exp(found) if cost(found) < cost(0.0) else 1.0


def tempered(probabilities: Tensor, temperature: float) -> Tensor:
    """Probabilities, (n, labels), with their logarithms divided by `temperature`; themselves at 1."""
    if temperature == 1.0:
        return probabilities
    return torch.softmax(probabilities.clamp_min(1e-300).log() / temperature, -1)
