"""Nearest neighbours: the mean centred losses of the k training samples whose mean embeddings are closest.

Distances are Euclidean on standardised embeddings. k is the one with the smallest squared error on validation, the
largest in a tie; the largest k offered is all samples, which is the constant router.
Cost: n d memory, one (n x d) product per prediction.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from moqe.router.examples import RoutingExamples
from moqe.router.features import Features
from moqe.router.router import Unit
from moqe.router.standardiser import Standardiser, fit_standardiser

NEIGHBOURS = (128, 64, 32, 16, 8, 4, 2, 1)


@dataclass(frozen=True)
class Knn:
    """The training samples. keys: standardised embeddings, float32, (n, d). values: centred losses, (n, experts)."""

    standardise: Standardiser
    keys: Tensor
    values: Tensor
    neighbours: int
    kind: ClassVar[str] = "knn"
    name: ClassVar[str] = "knn"
    unit: ClassVar[Unit] = "nats"

    def predict(self, features: Features) -> Tensor:
        """See `Router`."""
        return self.average(self.ranked(features), self.neighbours)

    def refit(self, examples: RoutingExamples) -> Knn:
        """The same number of neighbours, or all there are, on other examples."""
        return _remember(examples, min(self.neighbours, len(examples)))

    def ranked(self, features: Features) -> Tensor:
        """Training samples from the nearest to the farthest, int64 (m, n); the earlier one among equally near."""
        x = self.standardise(features.pooled()).float()
        keys = self.keys.to(x.device)
        squared = x.square().sum(1)[:, None] - 2.0 * x @ keys.T + keys.square().sum(1)[None]
        return squared.argsort(dim=1, stable=True)

    def average(self, ranked: Tensor, neighbours: int) -> Tensor:
        """Mean centred losses of the first `neighbours` training samples of each row of `ranked`: (m, experts)."""
        return self.values.to(ranked.device)[ranked[:, :neighbours]].mean(1)

    def options(self) -> dict[str, Any]:
        """What is saved beside the tensors."""
        return {"neighbours": self.neighbours}

    def tensors(self) -> dict[str, Tensor]:
        """What is saved."""
        return {
            "mean": self.standardise.mean,
            "deviation": self.standardise.deviation,
            "keys": self.keys,
            "values": self.values,
        }

    @classmethod
    def restore(cls, options: dict[str, Any], tensors: dict[str, Tensor]) -> Knn:
        """The router that was saved."""
        standardise = Standardiser(tensors["mean"], tensors["deviation"])
        return cls(standardise, tensors["keys"], tensors["values"], options["neighbours"])


def fit_knn(train: RoutingExamples, validation: RoutingExamples) -> Knn:
    """Remember `train`, with the number of neighbours that predicts `validation` best."""
    offered = [len(train), *(k for k in NEIGHBOURS if k < len(train))]
    router = _remember(train, len(train))
    target, ranked = validation.centred, router.ranked(validation.features)
    errors = [float((router.average(ranked, k) - target.to(ranked.device)).square().mean()) for k in offered]
    return _remember(train, offered[errors.index(min(errors))])


def _remember(examples: RoutingExamples, neighbours: int) -> Knn:
    pooled = examples.features.pooled()
    standardise = fit_standardiser(pooled)
    return Knn(standardise, standardise(pooled).float(), examples.centred.float().to(pooled.device), neighbours)
