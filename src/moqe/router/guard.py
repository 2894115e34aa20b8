"""The guard: leave the best single expert only where that has been seen to pay.

A router that learnt noise still switches experts. Two questions are asked on examples the router was not fitted to:

Global: is the mean gain over the fallback larger than its standard error, by document? If not, the router becomes the
constant one. A router that is too eager as a whole is still kept for its surest choices, if with one of the margins
below the gain is larger than two standard errors: two, because several margins had their chance.
Margin: how large must a predicted gain be before a sample leaves the fallback? Offered are zero and quantiles of the
predicted gains, those whose gain clears the bar above. The best of them is partly luck, so the one-standard-error rule
(Breiman et al. 1984) applies: the largest margin that is not worse than the best by more than the standard error of
their paired difference.

Where the router is the best of several on these very examples, such as the best epoch of a training, both bars are
raised to that of `moqe.router.selection` for as many candidates.

On pure noise this keeps about one router in a hundred (simulated: 4 experts, 100 and 400 samples, documents of 4).

A predicted gain is a difference of costs in the router's own unit: the margin is in nats for routers that predict nats
and in logits otherwise. The fallback is the expert with the lowest mean loss on validation, so a report that chooses
its best single expert there too finds a difference of exactly zero when the guard falls back. Among specialists it is
the generalist, whatever its loss on validation: the one expert that no kind of input was left out of.
Cost: none at prediction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moqe.router.baselines import Constant, fit_constant
from moqe.router.examples import RoutingExamples
from moqe.router.features import Features
from moqe.router.router import Router, Unit
from moqe.router.selection import bar
from moqe.router.uncertainty import ClusteredMean, clustered_mean

QUANTILES = (0.25, 0.5, 0.75, 0.9)  # of the positive predicted gains: the margins offered beside zero
BAR_OF_A_CHOSEN_MARGIN = 2.0  # standard errors


@dataclass(frozen=True)
class GuardDecision:
    """What the guard saw and decided.

    kept: whether the router stays. margin: in the router's unit. gain: mean loss of the fallback minus that of the
    router with this margin, in what judges, with its standard error by document. switched: share of samples that it
    sends to another expert.
    """

    fallback: int
    kept: bool
    margin: float
    gain: ClusteredMean
    switched: float


@dataclass(frozen=True)
class GuardedRouter:
    """A router whose choice counts only where its predicted gain over `fallback` is larger than `margin`."""

    router: Router
    fallback: int
    margin: float

    @property
    def name(self) -> str:
        """The inner router's."""
        return self.router.name

    @property
    def unit(self) -> Unit:
        """The inner router's."""
        return self.router.unit

    def predict(self, features: Features) -> Tensor:
        """The inner router's costs, with that of the fallback lowered by the margin: what another expert must beat."""
        costs = self.router.predict(features).clone()
        lowered = costs[:, self.fallback] - self.margin
        # One step further down, so that a gain of exactly the margin does not switch whatever the experts' order.
        costs[:, self.fallback] = torch.nextafter(lowered, torch.full_like(lowered, -torch.inf))
        return costs


def decide(costs: Tensor, losses: Tensor, document: Sequence[str], fallback: int, compared: int = 1) -> GuardDecision:
    """Choose the margin and whether to keep the router.

    costs: predicted, (n, experts), by a router that was not fitted to these samples. losses: what choices
    are judged by, (n, experts). document: n ids. compared: of how many routers it is the best on these samples.
    """
    costs, losses = costs.double().cpu(), losses.double().cpu()
    lowest, chosen = costs.min(1)
    predicted = costs[:, fallback] - lowest  # (n,), never negative
    realised = losses[:, fallback] - losses.gather(1, chosen[:, None])[:, 0]
    positive = predicted[predicted > 0]
    if len(positive) == 0:
        return GuardDecision(fallback, False, 0.0, clustered_mean(torch.zeros_like(realised), document), 0.0)

    margins = [0.0, *(float(positive.quantile(share)) for share in QUANTILES)]
    gains = [torch.where(predicted > margin, realised, 0.0) for margin in margins]
    means = [clustered_mean(gain, document) for gain in gains]
    least = bar(compared, means[0].documents)
    clears = means[0].value > least * means[0].standard_error
    needed = least if clears else max(least, BAR_OF_A_CHOSEN_MARGIN)
    offered = [i for i, mean in enumerate(means) if mean.value > needed * mean.standard_error]
    if not offered:
        return GuardDecision(fallback, False, 0.0, means[0], float((predicted > 0).double().mean()))
    best = max(offered, key=lambda i: means[i].value)
    behind = {i: clustered_mean(gains[best] - gains[i], document) for i in offered}
    taken = max(i for i, lag in behind.items() if lag.value <= lag.standard_error)
    switched = float((predicted > margins[taken]).double().mean())
    return GuardDecision(fallback, True, margins[taken], means[taken], switched)


def guarded_choice(costs: Tensor, decision: GuardDecision) -> Tensor:
    """The expert for each sample after the guard, from the unguarded router's costs: (n, experts) -> int64 (n,)."""
    lowest, chosen = costs.min(1)
    switches = (costs[:, decision.fallback] - lowest > decision.margin) & decision.kept
    return torch.where(switches, chosen, decision.fallback)


def apply_guard(router: Router, decision: GuardDecision, validation: RoutingExamples) -> GuardedRouter | Constant:
    """The router that a decision leaves: guarded by the margin, or constant on the fallback."""
    if decision.kept:
        return GuardedRouter(router, decision.fallback, decision.margin)
    return fit_constant(validation, decision.fallback)


def guard(
    router: Router, validation: RoutingExamples, fallback: int | None = None, compared: int = 1
) -> tuple[GuardedRouter | Constant, GuardDecision]:
    """Decide on `validation`, which the router was not fitted to, and return what is left with the decision.

    fallback: the expert that a choice must beat; None takes validation's best single expert. compared: see `decide`.
    """
    expert = validation.best_single if fallback is None else fallback
    costs = router.predict(validation.features)
    decision = decide(costs, validation.deciding, validation.document, expert, compared)
    return apply_guard(router, decision, validation), decision
