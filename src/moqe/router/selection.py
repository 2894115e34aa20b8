"""Choosing between ways to fit a router, by cross-validation over documents.

One validation set of a hundred windows cannot rank routers whose gains are a thousandth of a nat: the best of several
is mostly the luckiest. So every candidate is fitted several times, each time without one fold of the documents, and
judged on the predictions for samples it has not seen; a candidate counts only if its mean gain over the best single
expert is larger than its standard error, by document.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moqe.errors import DataError
from moqe.progress import Advance
from moqe.router.examples import RoutingExamples
from moqe.router.router import Router, choose, realised_losses
from moqe.router.uncertainty import ClusteredMean, clustered_mean

Fit = Callable[[RoutingExamples, RoutingExamples], Router]  # (train, validation) -> router


@dataclass(frozen=True)
class Candidate:
    """How one way to fit a router did on samples it had not seen.

    loss: nats per token of its choices. gain: that of the best single expert minus `loss`, sample by sample.
    """

    name: str
    loss: float
    gain: ClusteredMean

    @property
    def wins(self) -> bool:
        """Whether the gain is larger than its standard error."""
        return self.gain.value > self.gain.standard_error


def folds_by_document(document: Sequence[str], folds: int, seed: int) -> Tensor:
    """A fold for each of n samples, int64 (n,): whole documents, dealt so that folds hold about equally many samples.

    Raises DataError when there are fewer documents than folds.
    """
    sizes = Counter(document)
    if len(sizes) < folds:
        raise DataError(
            f"the router's data has {len(sizes)} documents and cross-validation needs {folds}: add documents to "
            "data.router"
        )
    names = list(sizes)
    shuffled = [names[i] for i in torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()]
    filled = [0] * folds
    fold_of: dict[str, int] = {}
    for name in sorted(shuffled, key=lambda name: -sizes[name]):  # stable: equal sizes stay shuffled
        fold = filled.index(min(filled))
        fold_of[name] = fold
        filled[fold] += sizes[name]
    return torch.tensor([fold_of[name] for name in document])


def predict_unseen(fit: Fit, examples: RoutingExamples, fold: Tensor, fold_done: Advance) -> Tensor:
    """Predicted costs of every sample by a router that has not seen its document: (n, experts).

    For each fold a router is fitted with the next fold as its validation and the others as its training set.
    `fold_done` is told after each. Needs at least three folds.
    """
    count = int(fold.max()) + 1
    costs = torch.zeros(examples.losses.shape, dtype=torch.float64)
    for held_out in range(count):
        follower = (held_out + 1) % count
        rows = torch.where(fold == held_out)[0]
        training = torch.where((fold != held_out) & (fold != follower))[0]
        router = fit(examples.select(training), examples.select(torch.where(fold == follower)[0]))
        costs[rows] = router.predict(examples.select(rows).features).double().cpu()
        fold_done(1)
    return costs


def judge(name: str, costs: Tensor, examples: RoutingExamples, best_single: int) -> Candidate:
    """How the choices by predicted costs, (n, experts), compare with always taking `best_single`."""
    losses = examples.losses.double().cpu()
    realised = realised_losses(losses, choose(costs))
    return Candidate(name, float(realised.mean()), clustered_mean(losses[:, best_single] - realised, examples.document))
