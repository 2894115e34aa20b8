"""Linear functions of a sample's standardised mean embedding: what `linear`, `logistic` and `domain-classifier` are.

All three are fitted in the basis of the training samples: with X = U S V^T, standardised, the rows of U S are the same
inputs turned, of at most n numbers each, and a weight found there has the same norm when V turns it back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moqe.router.examples import RoutingExamples
from moqe.router.features import Features
from moqe.router.standardiser import Standardiser, fit_standardiser

OFFSET_SHARE = 0.01  # of a penalty's strength, for the offset: enough to stay finite where one answer is always right


@dataclass(frozen=True)
class LinearScores:
    """Scores = standardised mean embedding @ weight + offset.

    weight: float64, (d, scores). offset: float64, (scores,). strength: of the penalty it was fitted with.
    """

    standardise: Standardiser
    weight: Tensor
    offset: Tensor
    strength: float

    def scores(self, features: Features) -> Tensor:
        """Float64, (n, scores), on the device of the features."""
        x = self.standardise(features.pooled())
        return x @ self.weight.to(x.device) + self.offset.to(x.device)

    def tensors(self) -> dict[str, Tensor]:
        """What is saved."""
        return {
            "mean": self.standardise.mean,
            "deviation": self.standardise.deviation,
            "weight": self.weight,
            "offset": self.offset,
        }


def saved_scores(tensors: dict[str, Tensor]) -> tuple[Standardiser, Tensor, Tensor]:
    """The first fields of `LinearScores` from what its `tensors` returned."""
    return Standardiser(tensors["mean"], tensors["deviation"]), tensors["weight"], tensors["offset"]


@dataclass(frozen=True)
class Basis:
    """Training samples in their own basis.

    left: U, float64 (n, r) with r = min(n, d). singular: the diagonal of S, (r,). right: V^T, (r, d).
    """

    standardise: Standardiser
    left: Tensor
    singular: Tensor
    right: Tensor

    @classmethod
    def of(cls, examples: RoutingExamples) -> Basis:
        """One decomposition, n d min(n, d)."""
        pooled = examples.features.pooled()
        standardise = fit_standardiser(pooled)
        return cls(standardise, *torch.linalg.svd(standardise(pooled), full_matrices=False))

    def back(self, parameters: Tensor) -> tuple[Standardiser, Tensor, Tensor]:
        """The first fields of `LinearScores` for weight and, in the last row, offset found here: (r + 1, scores)."""
        return self.standardise, self.right.T @ parameters[:-1], parameters[-1].clone()

    def minimise(self, loss: Callable[[Tensor], Tensor], start: Tensor, strength: float, iterations: int) -> Tensor:
        """Minimise loss(scores) + strength / 2 (|W|^2 + |b|^2 / 100) from a start like the result: (r + 1, scores).

        loss: of float64 scores, (n, scores). L-BFGS with strong Wolfe steps (Liu and Nocedal 1989; PyTorch's).
        """
        x = self.left * self.singular
        with torch.enable_grad():
            parameters = start.clone().requires_grad_()
            optimizer = torch.optim.LBFGS(
                [parameters],
                max_iter=iterations,
                tolerance_grad=1e-8,
                tolerance_change=1e-10,
                line_search_fn="strong_wolfe",
            )

            def objective() -> Tensor:
                optimizer.zero_grad()
                weight, offset = parameters[:-1], parameters[-1]
                held = weight.square().sum() + OFFSET_SHARE * offset.square().sum()
                value = loss(x @ weight + offset) + 0.5 * strength * held
                value.backward()  # type: ignore[no-untyped-call]
                return value

            optimizer.step(objective)  # type: ignore[no-untyped-call]
        return parameters.detach()

    def zeros(self, scores: int) -> Tensor:
        """Where a minimisation begins: (r + 1, scores)."""
        return torch.zeros(len(self.singular) + 1, scores, dtype=torch.float64, device=self.singular.device)
