"""Zero-skill routers: they look at no sample, and every line of a report stands beside theirs.

`constant` sends everything to the expert with the lowest mean loss; a router that does not beat it has learnt nothing
useful. `random` and `uniform` spread samples evenly, by draw and in turn: what a load balancer does.
Cost: none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from moqe.router.examples import RoutingExamples
from moqe.router.features import Features
from moqe.router.router import Unit, prefer


@dataclass(frozen=True)
class Constant:
    """The same costs for every sample: the experts' mean losses relative to their mean, (experts,)."""

    costs: Tensor
    kind: ClassVar[str] = "constant"
    name: ClassVar[str] = "constant"
    unit: ClassVar[Unit] = "nats"

    def predict(self, features: Features) -> Tensor:
        """See `Router`."""
        return self.costs.expand(len(features), -1).clone()

    def options(self) -> dict[str, Any]:
        """What is saved beside the tensors: nothing."""
        return {}

    def tensors(self) -> dict[str, Tensor]:
        """What is saved."""
        return {"costs": self.costs}

    @classmethod
    def restore(cls, options: dict[str, Any], tensors: dict[str, Tensor]) -> Constant:
        """The router that was saved."""
        return cls(tensors["costs"])


@dataclass(frozen=True)
class Random:
    """An expert drawn with equal probability for every sample; sample i of any features gets the same draw."""

    experts: int
    seed: int
    kind: ClassVar[str] = "random"
    name: ClassVar[str] = "random"
    unit: ClassVar[Unit] = "logit"

    def predict(self, features: Features) -> Tensor:
        """See `Router`."""
        return torch.rand(len(features), self.experts, generator=torch.Generator().manual_seed(self.seed))

    def options(self) -> dict[str, Any]:
        """What is saved."""
        return {"experts": self.experts, "seed": self.seed}

    def tensors(self) -> dict[str, Tensor]:
        """What is saved beside the options: nothing."""
        return {}

    @classmethod
    def restore(cls, options: dict[str, Any], tensors: dict[str, Tensor]) -> Random:
        """The router that was saved."""
        return cls(options["experts"], options["seed"])


@dataclass(frozen=True)
class Uniform:
    """The experts in turn, sample by sample: shares are equal to within one sample."""

    experts: int
    kind: ClassVar[str] = "uniform"
    name: ClassVar[str] = "uniform"
    unit: ClassVar[Unit] = "logit"

    def predict(self, features: Features) -> Tensor:
        """See `Router`."""
        turn = torch.arange(len(features)) % self.experts
        return 1.0 - torch.nn.functional.one_hot(turn, self.experts).float()

    def options(self) -> dict[str, Any]:
        """What is saved."""
        return {"experts": self.experts}

    def tensors(self) -> dict[str, Tensor]:
        """What is saved beside the options: nothing."""
        return {}

    @classmethod
    def restore(cls, options: dict[str, Any], tensors: dict[str, Tensor]) -> Uniform:
        """The router that was saved."""
        return cls(options["experts"])


def fit_constant(examples: RoutingExamples, expert: int | None = None) -> Constant:
    """The constant router that is best on the given examples, or the one that always takes `expert`.

    Where `expert` is not the best, its cost is put one step below the best one's.
    """
    losses = examples.deciding.double()
    costs = (losses - losses.mean(1, keepdim=True)).mean(0).float()
    if expert is None or int(costs.argmin()) == expert:
        return Constant(costs)
    return Constant(prefer(costs[None], expert, torch.ones(1, dtype=torch.bool))[0])
