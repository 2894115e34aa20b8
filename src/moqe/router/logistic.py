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
and its result are determined. L-BFGS with strong Wolfe steps in float64 (Liu and Nocedal 1989; PyTorch's). The strength
is the one whose choices are best on validation, the largest in a tie: the expected loss there would prefer whatever is
sure of itself, which is the smallest strength. Below the smallest one offered it only ever got worse.
Cost: n d experts multiplications per evaluation, some hundreds of them (2 seconds for 450 samples of 576 numbers);
inputs are first turned into the basis of the training samples, so that d is at most n.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from moqe.router.examples import RoutingExamples
from moqe.router.features import Features
from moqe.router.objectives import expected_loss
from moqe.router.router import Unit, choose, realised_losses
from moqe.router.standardiser import Standardiser, fit_standardiser

STRENGTHS = tuple(10.0 ** (exponent / 2) for exponent in range(2, -4, -1))  # 10 down to 0.03
OFFSET_SHARE = 0.01  # of the strength, for the offset
ITERATIONS = 60  # at most, for each strength


@dataclass(frozen=True)
class Logistic:
    """Costs = -(standardised mean embedding @ weight + offset). weight: float64, (d, experts); offset: (experts,)."""

    standardise: Standardiser
    weight: Tensor
    offset: Tensor
    strength: float
    kind: ClassVar[str] = "logistic"
    name: ClassVar[str] = "logistic"
    unit: ClassVar[Unit] = "logit"

    def predict(self, features: Features) -> Tensor:
        """See `Router`."""
        x = self.standardise(features.pooled())
        return -(x @ self.weight.to(x.device) + self.offset.to(x.device)).float()

    def refit(self, examples: RoutingExamples) -> Logistic:
        """The same strength on other examples."""
        return _path(examples, tuple(strength for strength in STRENGTHS if strength >= self.strength))[-1]

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
    def restore(cls, options: dict[str, Any], tensors: dict[str, Tensor]) -> Logistic:
        """The router that was saved."""
        standardise = Standardiser(tensors["mean"], tensors["deviation"])
        return cls(standardise, tensors["weight"], tensors["offset"], options["strength"])


def fit_logistic(train: RoutingExamples, validation: RoutingExamples) -> Logistic:
    """Fit on `train`, with the strength whose choices are best on `validation`."""
    candidates, judged = _path(train, STRENGTHS), validation.deciding.double()
    losses = [float(realised_losses(judged, choose(one.predict(validation.features))).mean()) for one in candidates]
    return candidates[losses.index(min(losses))]


def _path(examples: RoutingExamples, strengths: tuple[float, ...]) -> list[Logistic]:
    """The solutions for falling strengths."""
    pooled = examples.features.pooled()
    standardise = fit_standardiser(pooled)
    left, singular, right = torch.linalg.svd(standardise(pooled), full_matrices=False)
    x = left * singular  # (n, min(n, d)): the same inputs, turned; W's norm stays what it is
    centred = examples.centred.to(x.device)
    losses = centred / (centred.square().mean().sqrt() or 1.0)
    parameters = torch.zeros(x.shape[1] + 1, examples.experts, dtype=torch.float64, device=x.device)
    found = []
    for strength in strengths:
        parameters = _minimise(x, losses, parameters, strength)
        found.append(Logistic(standardise, right.T @ parameters[:-1], parameters[-1].clone(), strength))
    return found


def _minimise(x: Tensor, losses: Tensor, start: Tensor, strength: float) -> Tensor:
    """Weight and, in the last row, offset at a minimum of the objective: (d + 1, experts)."""
    with torch.enable_grad():
        parameters = start.clone().requires_grad_()
        optimizer = torch.optim.LBFGS(
            [parameters],
            max_iter=ITERATIONS,
            tolerance_grad=1e-8,
            tolerance_change=1e-10,
            line_search_fn="strong_wolfe",
        )

        def objective() -> Tensor:
            optimizer.zero_grad()
            weight, offset = parameters[:-1], parameters[-1]
            held = weight.square().sum() + OFFSET_SHARE * offset.square().sum()
            value = expected_loss(x @ weight + offset, losses) + 0.5 * strength * held
            value.backward()  # type: ignore[no-untyped-call]
            return value

        optimizer.step(objective)  # type: ignore[no-untyped-call]
    return parameters.detach()
