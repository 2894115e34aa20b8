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
from moqe.router.router import Unit
from moqe.router.standardiser import Standardiser, fit_standardiser

STRENGTHS = tuple(10.0 ** (exponent / 2) for exponent in range(8, -7, -1))  # 10^4 down to 10^-3


@dataclass(frozen=True)
class Linear:
    """Costs = standardised mean embedding @ weight + offset. weight: float64, (d, experts); offset: (experts,)."""

    standardise: Standardiser
    weight: Tensor
    offset: Tensor
    strength: float
    kind: ClassVar[str] = "linear"
    name: ClassVar[str] = "linear"
    unit: ClassVar[Unit] = "nats"

    def predict(self, features: Features) -> Tensor:
        """See `Router`."""
        x = self.standardise(features.pooled())
        return (x @ self.weight.to(x.device) + self.offset.to(x.device)).float()

    def refit(self, examples: RoutingExamples) -> Linear:
        """The same strength on other examples."""
        return _solve(examples, (self.strength,))[0]

    def options(self) -> dict[str, Any]:
        """What is saved beside the tensors."""
        return {"strength": self.strength}

    def tensors(self) -> dict[str, Tensor]:
        """What is saved."""
        return {
            "mean": self.standardise.mean,
            "deviation": self.standardise.deviation,
            "weight": self.weight,
            "offset": self.offset,
        }

    @classmethod
    def restore(cls, options: dict[str, Any], tensors: dict[str, Tensor]) -> Linear:
        """The router that was saved."""
        standardise = Standardiser(tensors["mean"], tensors["deviation"])
        return cls(standardise, tensors["weight"], tensors["offset"], options["strength"])


def fit_linear(train: RoutingExamples, validation: RoutingExamples) -> Linear:
    """Fit on `train`, with the strength that predicts `validation` best."""
    target = validation.centred
    candidates = _solve(train, STRENGTHS)
    errors = [float((router.predict(validation.features) - target).square().mean()) for router in candidates]
    return candidates[errors.index(min(errors))]


def _solve(examples: RoutingExamples, strengths: tuple[float, ...]) -> list[Linear]:
    pooled = examples.features.pooled()
    standardise = fit_standardiser(pooled)
    left, singular, right = torch.linalg.svd(standardise(pooled), full_matrices=False)
    centred = examples.centred.to(left.device)
    offset = centred.mean(0)
    projected = left.T @ (centred - offset)  # (min(n, d), experts)
    return [
        Linear(
            standardise,
            right.T @ ((singular / (singular.square() + len(examples) * strength))[:, None] * projected),
            offset,
            strength,
        )
        for strength in strengths
    ]
