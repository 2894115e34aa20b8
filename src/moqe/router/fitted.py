"""A router together with how it came about: what it was compared with, how it trained, what the guard decided."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from moqe.router.guard import GuardDecision
from moqe.router.novelty import Novelty
from moqe.router.router import Router
from moqe.router.selection import Candidate
from moqe.router.training import Epoch
from moqe.router.uncertainty import ClusteredMean


@dataclass(frozen=True)
class UnseenChoices:
    """What a router chooses for samples that it was not fitted to, as policies on top of it need to know.

    rows: int64, (m,), counted over the training samples followed by those of validation. choice: int64, (m,), after the
    guard. `tuned` made each of them without the sample's document, by cross-validation; `paper` has validation's.
    """

    rows: Tensor
    choice: Tensor


@dataclass(frozen=True)
class FittedNovelty:
    """What tells novel samples, the quantile it was fitted with, and what it told of training and validation samples.

    novel: bool, (n,), over the training samples followed by those of validation, each told by documents of other folds.
    """

    novelty: Novelty
    quantile: float
    novel: Tensor


@dataclass(frozen=True)
class FittedRouter:
    """A router to deploy and how it came about.

    router: with the guard, if the recipe wants one. unguarded: the same without. candidates: what was compared, on
    unseen samples; for `paper` its one line on validation. history: the epochs of the paper's network. guard: None
    without one, or where there was nothing to guard. unseen: what `router` does on samples new to it; not saved.
    novelty: None where no sample counts as novel.
    """

    router: Router
    unguarded: Router
    chosen: str
    candidates: tuple[Candidate, ...]
    history: tuple[Epoch, ...]
    guard: GuardDecision | None
    unseen: UnseenChoices
    novelty: FittedNovelty | None = None

    def to_json(self) -> dict[str, Any]:
        """How it came about, for files and reports: `chosen`, `unit`, `candidates`, `history`, `guard` and `novelty`.

        Losses and gains are in what judges (see `RoutingExamples`). An infinite standard error, of one document, is
        null.
        """
        return {
            "chosen": self.chosen,
            "unit": self.unguarded.unit,
            "candidates": [
                {"name": candidate.name, "loss": candidate.loss, "wins": candidate.wins, "gain": _gain(candidate.gain)}
                for candidate in self.candidates
            ],
            "history": [asdict(epoch) for epoch in self.history],
            "guard": None
            if self.guard is None
            else {
                "kept": self.guard.kept,
                "fallback": self.guard.fallback,
                "margin": self.guard.margin,
                "switched": self.guard.switched,
                "gain": _gain(self.guard.gain),
            },
            "novelty": None
            if self.novelty is None
            else {
                "quantile": self.novelty.quantile,
                "levels": [level.to_json() for level in self.novelty.novelty.levels],
                "neighbours": self.novelty.novelty.neighbours,
                "novel": float(self.novelty.novel.double().mean()),
            },
        }


def _gain(gain: ClusteredMean) -> dict[str, float | int | None]:
    error = gain.standard_error if math.isfinite(gain.standard_error) else None
    return {"value": gain.value, "standard_error": error, "documents": gain.documents}
