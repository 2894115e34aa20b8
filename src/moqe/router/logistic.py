"""Multinomial logistic regression on the mean embedding of a sample, trained on what its choices would cost.

With probabilities p = softmax(x W + b) for standardised inputs x, (d), and the experts' losses of each sample, centred
and divided by their root mean square over the training set, it minimises the loss of a random choice by p,

    mean over samples of sum_j p_j loss_j  +  strength / 2 * (|W|^2 + |b|^2 / 100)

No label is made of the best expert: samples on which experts hardly differ hardly count, which a hard label would turn
into coin tosses. The offset is held back a hundredth as much, enough to stay finite where one expert is always best.

What it is for: specialists that differ by kind of text. In a first trial of them (3-bit blended-statistics experts of
SmolLM2-135M) such a router collected most of what the true domain label collects. Planted on the embeddings of six
domains (7 experts, 450 training windows, noise of .02 nats a window), the share of what the label collects, mean of
4 seeds:

    nats won in the own domain, tokens seen   .020, 64   .020, 256   .012, 64
    logistic                                  .72        .82         .62
    linear                                    .68        .78         .61
    knn                                       .63        .77         .53

The objective is not convex; from W = 0 at the largest strength each solution starts the next smaller one, so the path
and its result are determined. The strength is the one whose choices are best on validation, the largest in a tie: the
expected loss there would prefer whatever is sure of itself, which is the smallest strength. Below the smallest one
offered it only ever got worse.
Cost: n d experts multiplications per evaluation, some hundreds of them (2 seconds for 450 samples of 576 numbers); in
the basis of the training samples d is at most n.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from moqe.router.examples import RoutingExamples
from moqe.router.features import Features
from moqe.router.linear_scores import Basis, LinearScores, saved_scores
from moqe.router.objectives import expected_loss
from moqe.router.router import Unit, choose, realised_losses

STRENGTHS = tuple(10.0 ** (exponent / 2) for exponent in range(2, -4, -1))  # 10 down to 0.03
ITERATIONS = 60  # at most, for each strength


@dataclass(frozen=True)
class Logistic(LinearScores):
    """Costs = -scores, one score per expert."""

    kind: ClassVar[str] = "logistic"
    name: ClassVar[str] = "logistic"
    unit: ClassVar[Unit] = "logit"

    def predict(self, features: Features) -> Tensor:
        """See `Router`."""
        return -self.scores(features).float()

    def refit(self, examples: RoutingExamples) -> Logistic:
        """The same strength on other examples."""
        return _path(examples, tuple(strength for strength in STRENGTHS if strength >= self.strength))[-1]

    def options(self) -> dict[str, Any]:
        """What is saved beside the tensors."""
        return {"strength": self.strength}

    @classmethod
    def restore(cls, options: dict[str, Any], tensors: dict[str, Tensor]) -> Logistic:
        """The router that was saved."""
        return cls(*saved_scores(tensors), options["strength"])


def fit_logistic(train: RoutingExamples, validation: RoutingExamples) -> Logistic:
    """Fit on `train`, with the strength whose choices are best on `validation`."""
    candidates, judged = _path(train, STRENGTHS), validation.deciding.double()
    losses = [float(realised_losses(judged, choose(one.predict(validation.features))).mean()) for one in candidates]
    return candidates[losses.index(min(losses))]


def _path(examples: RoutingExamples, strengths: tuple[float, ...]) -> list[Logistic]:
    """The solutions for falling strengths."""
    basis = Basis.of(examples)
    centred = examples.centred.to(basis.left.device)
    losses = centred / (centred.square().mean().sqrt() or 1.0)
    parameters, found = basis.zeros(examples.experts), []
    for strength in strengths:
        parameters = basis.minimise(lambda scores: expected_loss(scores, losses), parameters, strength, ITERATIONS)
        found.append(Logistic(*basis.back(parameters), strength))
    return found
