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

    losses: what a router is fitted to, float, (n, experts): nats per token or per image. document: n ids of the unit
    that is resampled: samples of one document are not independent, so standard errors and folds count documents.
    judged: what choices are judged by, (n, experts), where that is something else: a router of images learns from
    cross-entropy, which says more than right or wrong, while epochs, candidates, the best single expert and the guard
    are about wrong answers, as the verdict is. None means the losses. label: n domains, where samples have some that
    nobody asks an expert for (a class is asked for); a router may learn to tell them.

    Raises DataError when the lengths differ or there are no samples, NumericalError when a loss is not finite.
    """

    features: Features
    losses: Tensor
    document: tuple[str, ...]
    judged: Tensor | None = None
    label: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if not len(self.features) == len(self.document) == self.losses.shape[0]:
            raise DataError(
                f"{len(self.features)} features, {self.losses.shape[0]} rows of losses and {len(self.document)} "
                "documents do not describe the same samples"
            )
        if self.label is not None and len(self.label) != len(self.document):
            raise DataError(f"{len(self.label)} labels do not belong to {len(self.document)} samples")
        if len(self.document) == 0:
            raise DataError("a router cannot be trained or judged on no samples: add documents to data.router")
        if self.deciding.shape != self.losses.shape:
            raise DataError(
                f"losses of shape {tuple(self.losses.shape)} cannot be judged by values of shape "
                f"{tuple(self.deciding.shape)}"
            )
        if not bool(torch.isfinite(self.losses).all() and torch.isfinite(self.deciding).all()):
            raise NumericalError("a loss in the router's examples is not finite: score the experts again")

    def __len__(self) -> int:
        return len(self.document)

    @property
    def experts(self) -> int:
        """The number of experts."""
        return int(self.losses.shape[1])

    @property
    def deciding(self) -> Tensor:
        """What choices are judged by, lower is better: (n, experts)."""
        return self.losses if self.judged is None else self.judged

    @property
    def centred(self) -> Tensor:
        """Losses minus each sample's mean over the experts: float64, (n, experts).

        How hard a sample is, the same for all experts, is most of the loss and says nothing about the choice.
        """
        losses = self.losses.double()
        return losses - losses.mean(1, keepdim=True)

    @property
    def best_single(self) -> int:
        """The expert with the lowest mean, of what choices are judged by."""
        return int(self.deciding.double().mean(0).argmin())

    def select(self, rows: Tensor) -> RoutingExamples:
        """The examples at `rows`, int64 (m,), in that order."""
        return RoutingExamples(
            SelectedFeatures(self.features, rows),
            self.losses[rows.to(self.losses.device)],
            tuple(self.document[int(row)] for row in rows),
            None if self.judged is None else self.judged[rows.to(self.judged.device)],
            None if self.label is None else tuple(self.label[int(row)] for row in rows),
        )

    def join(self, other: RoutingExamples) -> RoutingExamples:
        """These examples followed by the other ones, which are judged as these are.

        Raises DataError where only one of the two says what judges.
        """
        if (self.judged is None) != (other.judged is None):
            raise DataError("examples that are judged by their losses cannot be joined with others that are not")
        judged = None
        if self.judged is not None and other.judged is not None:
            judged = torch.cat([self.judged, other.judged])
        return RoutingExamples(
            JoinedFeatures(self.features, other.features),
            torch.cat([self.losses, other.losses]),
            self.document + other.document,
            judged,
            None if self.label is None or other.label is None else self.label + other.label,
        )
