"""The cascade: a second expert answers where the first is unsure, and their probabilities are averaged.

Not in the MoQE paper. Choosing one expert per image throws away what the others know; asking two always doubles the
cost. A classifier says itself where it may be wrong: its top probability is low (Chow 1970's reject option; Viola and
Jones 2001 for the word). So the first expert answers, and only when its top probability is at most `threshold` the
second answers too. The mean cost is 1 + the share of samples for which that happens.

    threshold 0  the first expert's answer, always: a probability is never 0 at the top
    threshold 1  two experts, always

Fitting, on samples whose labels are known and which no expert was trained on:
- The partner of an expert is the one whose average with it gains the most right answers where it is unsure, over all
  samples and not only those routed to it, which can be few; gained log probability of the label breaks ties. "Unsure"
  is what the largest affordable threshold says.
- The threshold is the one with the most right answers; the cheapest of equals. It lies midway between two top
  probabilities that were seen, so that rounding moves nobody across.
- A threshold is affordable when the 95 % upper bound (Wilson, one-sided) of the share of samples that pay for two
  experts stays below `max_cost` - 1: the bound is meant for inputs to come, where a share that only just fitted would
  overshoot half of the time.

Which expert is asked first is the router's business, with one exception: a router trained on cross-entropy may lose
right answers while it gains nats (measured on CIFAR-10: 0.4 to 0.9 points), and a cascade on top inherits that. So
`fit_guarded_cascade` offers the best single expert as the first for all samples too, and leaves it for the router only
where that pays.
Cost: experts^2 averages of (samples, classes) in fitting; nothing but the second expert's forward pass in use.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moqe.errors import DataError, RecipeError
from moqe.router.uncertainty import ClusteredMean, clustered_mean

FOLDS = 5
FEWEST_UNSEEN = 2 * FOLDS  # samples new to the router that a guarded cascade takes
_Z = 1.6449  # the 95 % quantile of the normal distribution
_SMALLEST = 1e-9  # probabilities of a label count at least this much, so that one image cannot decide a tie


@dataclass(frozen=True)
class CascadeAnswer:
    """What a cascade answers.

    probabilities: (n, classes). first: the expert that answered first, int64 (n,). second: the one asked after it,
    int64 (n,), whether or not it was. second_used: bool, (n,). `cost` is in forward passes of an expert, (n,).
    """

    probabilities: Tensor
    first: Tensor
    second: Tensor
    second_used: Tensor

    @property
    def cost(self) -> Tensor:
        """1 or 2 forward passes for each sample: float64, (n,)."""
        return 1.0 + self.second_used.double()


@dataclass(frozen=True)
class Cascade:
    """When to ask a second expert, and which.

    second[i] is the expert asked after expert i. always_first: the expert that answers first whatever the router says;
    None leaves that to the router.
    """

    threshold: float
    second: tuple[int, ...]
    always_first: int | None = None

    def first(self, choice: Tensor) -> Tensor:
        """Who answers first, for the router's choice: int64 (n,) -> int64 (n,)."""
        return choice if self.always_first is None else torch.full_like(choice, self.always_first)

    def partner(self, first: Tensor) -> Tensor:
        """Who would be asked after each first expert: int64 (n,) -> int64 (n,)."""
        return torch.tensor(self.second, device=first.device)[first]

    def unsure(self, probabilities: Tensor) -> Tensor:
        """Whether a second expert is asked after the first one's probabilities: (n, classes) -> bool (n,)."""
        return probabilities.amax(1) <= self.threshold

    def answer(self, choice: Tensor, probabilities: Tensor) -> CascadeAnswer:
        """The answer where every expert's is known.

        choice: the router's, int64 (n,). probabilities: of every expert, (n, experts, classes).
        """
        rows = torch.arange(len(choice), device=choice.device)
        first = self.first(choice)
        second = self.partner(first)
        alone = probabilities[rows, first]
        unsure = self.unsure(alone)
        both = (alone + probabilities[rows, second]) / 2.0
        return CascadeAnswer(torch.where(unsure[:, None], both, alone), first, second, unsure)


@dataclass(frozen=True)
class CascadeDecision:
    """A cascade and why it is one.

    cascade: what to deploy; with threshold 0 it is the plain route. gain: right answers per image over those of the
    first expert alone, on samples that neither the threshold nor the partners were chosen on, as a share. kept: whether
    that clears its standard error. cost: mean forward passes, on the samples it was fitted to.
    """

    cascade: Cascade
    kept: bool
    gain: ClusteredMean
    cost: float


def fit_cascade(choice: Tensor, probabilities: Tensor, labels: Tensor, max_cost: float) -> Cascade:
    """The cascade with the most right answers whose mean cost is affordable; see the file's header.

    choice: the first expert for each sample, int64 (n,). probabilities: (n, experts, classes). labels: int64 (n,). All
    on the CPU. max_cost: forward passes per sample, between 1 and 2.

    Raises DataError when the lengths differ or there are no samples, RecipeError for a cost below 1 or for one expert.
    """
    _check(choice, probabilities, labels, max_cost)
    samples = len(choice)
    rows = torch.arange(samples)
    tops, order = probabilities[rows, choice].amax(1).sort(stable=True)
    midway = (tops[:-1] + tops[1:]) / 2.0
    midway = torch.where(midway < tops[1:], midway, tops[:-1])  # between neighbours there is no number to lie on
    thresholds = torch.cat([midway, torch.ones(1, dtype=tops.dtype)])
    # Samples with equal tops are asked about together, so only the last of a run ends a prefix.
    ends = torch.cat([tops[1:] > tops[:-1], torch.ones(1, dtype=torch.bool)])
    ends[_affordable(samples, max_cost) :] = False
    affordable = thresholds[ends]
    if len(affordable) == 0:
        return Cascade(0.0, _partners(probabilities, labels, 0.0))
    second = _partners(probabilities, labels, float(affordable[-1]))

    alone = probabilities[rows, choice]
    both = (alone + probabilities[rows, torch.tensor(second)[choice]]) / 2.0
    gained = _right(both, labels) - _right(alone, labels)
    gains = gained[order].cumsum(0).masked_fill(~ends, -samples)  # of asking about the first 1, 2, ... samples
    best = int(gains.argmax())  # the first of equals, hence the cheapest
    return Cascade(float(thresholds[best]) if gains[best] > 0 else 0.0, second)


def fit_guarded_cascade(
    choice: Tensor,
    probabilities: Tensor,
    labels: Tensor,
    max_cost: float,
    unseen: Tensor | None = None,
    seed: int = 0,
) -> CascadeDecision:
    """A cascade on the router's choice or on the best single expert, or the plain route if neither is seen to pay.

    unseen: bool, (n,): samples whose choice was made by a router that was not fitted to them; None means all. The best
    single expert needs no router and is judged on every sample; a cascade on the router's choice only on those. Each is
    fitted without a fifth of the samples and judged on it, five times. The cascade on the router's choice is taken if
    it beats the one on the best single expert by more than the standard error of their difference, and the one taken is
    kept if it beats its first experts' own answers by so much.

    Raises as `fit_cascade` does, and DataError for fewer than FEWEST_UNSEEN unseen samples.
    """
    _check(choice, probabilities, labels, max_cost)
    known = torch.arange(len(choice)) if unseen is None else torch.where(unseen)[0]
    if len(known) < FEWEST_UNSEEN:
        raise DataError(
            f"a cascade needs at least {FEWEST_UNSEEN} samples new to the router, and there are {len(known)}: "
            "add images to data.router, or set router.policy to route"
        )
    single = int((probabilities.argmax(2) == labels[:, None]).double().mean(0).argmax())
    samples = _Samples(torch.full_like(choice, single), probabilities, labels)
    routed = _Samples(choice[known], probabilities[known], labels[known])
    on_single, on_route = (part.right_unseen(max_cost, seed) for part in (samples, routed))

    by_router = _clears(_mean(on_route - on_single[known]))
    taken, right = (routed, on_route) if by_router else (samples, on_single)
    fitted = fit_cascade(taken.choice, taken.probabilities, taken.labels, max_cost)
    gain = _mean(right - _right(taken.alone, taken.labels))
    if not _clears(gain):
        return CascadeDecision(Cascade(0.0, fitted.second), False, gain, 1.0)
    cost = float(fitted.answer(taken.choice, taken.probabilities).cost.mean())
    return CascadeDecision(replace(fitted, always_first=None if by_router else single), True, gain, cost)


@dataclass(frozen=True)
class _Samples:
    """Who answers first, int64 (n,); everybody's probabilities, (n, experts, classes); labels, int64 (n,)."""

    choice: Tensor
    probabilities: Tensor
    labels: Tensor

    @property
    def alone(self) -> Tensor:
        """What the first experts answer: (n, classes)."""
        return self.probabilities[torch.arange(len(self.choice)), self.choice]

    def select(self, rows: Tensor) -> _Samples:
        """The samples at some rows, by mask."""
        return _Samples(self.choice[rows], self.probabilities[rows], self.labels[rows])

    def right_unseen(self, max_cost: float, seed: int) -> Tensor:
        """Right answers of cascades that were fitted without the sample's fold: float64, (n,)."""
        fold = torch.randperm(len(self.choice), generator=torch.Generator().manual_seed(seed)) % FOLDS
        right = torch.zeros(len(self.choice), dtype=torch.float64)
        for held_out in range(FOLDS):
            others, judged = self.select(fold != held_out), self.select(fold == held_out)
            cascade = fit_cascade(others.choice, others.probabilities, others.labels, max_cost)
            answer = cascade.answer(judged.choice, judged.probabilities)
            right[fold == held_out] = _right(answer.probabilities, judged.labels)
        return right


def _right(probabilities: Tensor, labels: Tensor) -> Tensor:
    """1 for a right answer, 0 for a wrong one: (n, classes), (n,) -> float64 (n,)."""
    return (probabilities.argmax(1) == labels).double()


def _partners(probabilities: Tensor, labels: Tensor, threshold: float) -> tuple[int, ...]:
    """The best partner of every expert, over the samples where its top probability is at most `threshold`."""
    experts = probabilities.shape[1]
    partners = []
    for first in range(experts):
        unsure = probabilities[:, first].amax(1) <= threshold
        answers, label = probabilities[unsure], labels[unsure]
        scores = {}
        for second in range(experts):
            if second != first:
                both = (answers[:, first] + answers[:, second]) / 2.0
                of_label = both.gather(1, label[:, None]).double().clamp(min=_SMALLEST)
                scores[second] = (float(_right(both, label).sum()), float(of_label.log().sum()), -second)
        partners.append(max(scores, key=lambda second: scores[second]))
    return tuple(partners)


def _affordable(samples: int, max_cost: float) -> int:
    """The largest number of samples, of so many, that may pay for a second expert."""
    share = torch.arange(samples + 1, dtype=torch.float64) / samples
    spread = (share * (1.0 - share) / samples + _Z**2 / (4.0 * samples**2)).sqrt()
    upper = (share + _Z**2 / (2.0 * samples) + _Z * spread) / (1.0 + _Z**2 / samples)
    upper[0] = 0.0  # nobody is asked: no estimate is needed
    return int((upper <= max_cost - 1.0 + 1e-12).nonzero().max())


def _mean(values: Tensor) -> ClusteredMean:
    """The mean over images, each of which is a document of its own."""
    return clustered_mean(values, [str(row) for row in range(len(values))])


def _clears(mean: ClusteredMean) -> bool:
    return math.isfinite(mean.standard_error) and mean.value > mean.standard_error


def _check(choice: Tensor, probabilities: Tensor, labels: Tensor, max_cost: float) -> None:
    if not len(choice) == len(probabilities) == len(labels):
        raise DataError(
            f"{len(choice)} choices, {len(probabilities)} rows of probabilities and {len(labels)} labels do not "
            "describe the same samples"
        )
    if len(choice) == 0:
        raise DataError("a cascade cannot be fitted to no samples: add images to data.router")
    if probabilities.shape[1] < 2:
        raise RecipeError("a cascade needs two experts or more: add an expert, or set router.policy to route")
    if not 1.0 <= max_cost <= 2.0:
        raise RecipeError(f"router.max_cost is {max_cost}: a cascade costs between 1 and 2 forward passes")
