"""What a router is: from the features of samples to a predicted cost per expert, the lowest of which is chosen."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from moqe.errors import NumericalError
from moqe.router.features import Features

Unit = Literal["nats", "logit"]


class Router(Protocol):
    """A trained router.

    `unit` says what costs are measured in. "nats": predicted nats per token, relative to the mean over the experts, so
    the difference of two costs is a predicted gain. "logit": negative log odds of being the best expert, or any other
    score in which only order and rough distance mean something. In both, lower is better.
    """

    @property
    def name(self) -> str:
        """The word for this router in tables and files."""

    @property
    def unit(self) -> Unit:
        """What the costs are measured in."""

    def predict(self, features: Features) -> Tensor:
        """Predicted cost of every expert on every sample: float, (n, experts), on the features' device."""


class SavableRouter(Router, Protocol):
    """A router that can be written to disk: JSON options and named tensors, from which it is restored."""

    kind: ClassVar[str]

    def options(self) -> dict[str, Any]:
        """What is saved as JSON."""

    def tensors(self) -> dict[str, Tensor]:
        """What is saved as tensors."""

    @classmethod
    def restore(cls, options: dict[str, Any], tensors: dict[str, Tensor]) -> Router:
        """The router that was saved."""


def choose(costs: Tensor) -> Tensor:
    """The expert with the lowest cost, (n, experts) -> int64 (n,); the first of them where costs are equal.

    Raises NumericalError when a cost is not a number.
    """
    if bool(torch.isnan(costs).any()):
        raise NumericalError("the router predicted a cost that is not a number: train it again, with a lower rate")
    return costs.argmin(1)


def prefer(costs: Tensor, expert: int, rows: Tensor) -> Tensor:
    """Costs, (n, experts), with `expert` one step below the lowest of each of the given rows, bool (n,)."""
    lowest = costs.amin(1)
    lowered = torch.nextafter(lowest, torch.full_like(lowest, -torch.inf))
    preferred = costs.clone()
    preferred[:, expert] = torch.where(rows, lowered, costs[:, expert])
    return preferred


def realised_losses(losses: Tensor, chosen: Tensor) -> Tensor:
    """The loss each sample gets from the expert chosen for it: (n, experts) and int64 (n,) -> (n,)."""
    return losses.gather(1, chosen.to(losses.device)[:, None])[:, 0]
