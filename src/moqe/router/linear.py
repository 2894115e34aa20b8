"""Ridge regression of the experts' centred losses on the mean embedding of a sample.

Closed form (Hoerl and Kennard 1970) on standardised inputs X, (n, d), and centred targets Y, (n, experts), through the
singular value decomposition X = U S V^T, which gives all strengths lambda at the price of one:

    W = V diag(s / (s^2 + n lambda)) U^T Y

The strength is the one with the smallest squared error on validation; the largest in a tie. Squared error, not the loss
of the choice, because it moves smoothly and so is less at the mercy of a few samples near a tie.
Cost: one decomposition, n d min(n, d); a prediction is one (d x experts) product.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from moqe.router.examples import RoutingExamples
from moqe.router.features import Features
from moqe.router.linear_scores import Basis, LinearScores, saved_scores
from moqe.router.router import Unit

STRENGTHS = tuple(10.0 ** (exponent / 2) for exponent in range(8, -7, -1))  # 10^4 down to 10^-3


@dataclass(frozen=True)
class Linear(LinearScores):
    """Costs = scores, one per expert."""

    kind: ClassVar[str] = "linear"
    name: ClassVar[str] = "linear"
    unit: ClassVar[Unit] = "nats"

    def predict(self, features: Features) -> Tensor:
        """See `Router`."""
        return self.scores(features).float()

    def refit(self, examples: RoutingExamples) -> Linear:
        """The same strength on other examples."""
        return _solve(examples, (self.strength,))[0]

    def options(self) -> dict[str, Any]:
        """What is saved beside the tensors."""
        return {"strength": self.strength}

    @classmethod
    def restore(cls, options: dict[str, Any], tensors: dict[str, Tensor]) -> Linear:
        """The router that was saved."""
        return cls(*saved_scores(tensors), options["strength"])


def fit_linear(train: RoutingExamples, validation: RoutingExamples) -> Linear:
    """Fit on `train`, with the strength that predicts `validation` best."""
    target = validation.centred
    candidates = _solve(train, STRENGTHS)
    errors = [float((router.predict(validation.features) - target).square().mean()) for router in candidates]
    return candidates[errors.index(min(errors))]


def _solve(examples: RoutingExamples, strengths: tuple[float, ...]) -> list[Linear]:
    basis = Basis.of(examples)
    singular, centred = basis.singular, examples.centred.to(basis.left.device)
    offset = centred.mean(0)
    projected = basis.left.T @ (centred - offset)  # (min(n, d), experts)
    found = []
    for strength in strengths:
        weight = (singular / (singular.square() + len(examples) * strength))[:, None] * projected
        found.append(Linear(*basis.back(torch.cat([weight, offset[None]])), strength))
    return found
