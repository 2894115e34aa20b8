"""What a router is trained on: features of samples, the loss of every expert on them, and the document of each."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moqe.errors import DataError, NumericalError
from moqe.router.features import Features, JoinedFeatures, SelectedFeatures


@dataclass(frozen=True)
class RoutingExamples:
    """n samples with known losses.

    losses: nats per token, float, (n, experts). document: n ids of the unit that is resampled: samples of one document
    are not independent, so standard errors and folds count documents.

    Raises DataError when the lengths differ or there are no samples, NumericalError when a loss is not finite.
    """

    features: Features
    losses: Tensor
    document: tuple[str, ...]

    def __post_init__(self) -> None:
        if not len(self.features) == len(self.document) == self.losses.shape[0]:
            raise DataError(
                f"{len(self.features)} features, {self.losses.shape[0]} rows of losses and {len(self.document)} "
                "documents do not describe the same samples"
            )
        if len(self.document) == 0:
            raise DataError("a router cannot be trained or judged on no samples: add documents to data.router")
        if not bool(torch.isfinite(self.losses).all()):
            raise NumericalError("a loss in the router's examples is not finite: score the experts again")

    def __len__(self) -> int:
        return len(self.document)

    @property
    def experts(self) -> int:
        """The number of experts."""
        return int(self.losses.shape[1])

    @property
    def centred(self) -> Tensor:
        """Losses minus each sample's mean over the experts: float64, (n, experts), nats per token.

        How hard a sample is, the same for all experts, is most of the loss and says nothing about the choice.
        """
        losses = self.losses.double()
        return losses - losses.mean(1, keepdim=True)

    @property
    def best_single(self) -> int:
        """The expert with the lowest mean loss."""
        return int(self.losses.double().mean(0).argmin())

    def select(self, rows: Tensor) -> RoutingExamples:
        """The examples at `rows`, int64 (m,), in that order."""
        return RoutingExamples(
            SelectedFeatures(self.features, rows),
            self.losses[rows.to(self.losses.device)],
            tuple(self.document[int(row)] for row in rows),
        )

    def join(self, other: RoutingExamples) -> RoutingExamples:
        """These examples followed by the other ones."""
        return RoutingExamples(
            JoinedFeatures(self.features, other.features),
            torch.cat([self.losses, other.losses]),
            self.document + other.document,
        )
