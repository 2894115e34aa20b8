"""Choosing between ways to fit a router, by cross-validation over documents.

One validation set of a hundred windows cannot rank routers whose gains are a thousandth of a nat: the best of several
is mostly the luckiest. So every candidate is fitted several times, each time without one fold of the documents, and
judged on the predictions for samples it has not seen; a candidate counts only if its mean gain over the best single
expert clears `bar`: one standard error, by document, when it is the only candidate, and more the more there are.

One standard error is cleared by pure noise in 16 % of trials (17 % with ten documents). The best of five independent
candidates of noise would clear it in 1 - 0.84^5 = 58 % of them, so that chance is divided by the number of candidates
(Bonferroni), which holds however they resemble each other. The standard error is itself estimated from a few documents,
so quantiles are Student's: with g documents, k candidates and T distributed as t with g - 1 degrees of freedom, the bar
is the b with P(T > b) = P(T > 1) / k. For seven candidates that is 2.1 standard errors on 40 documents and 2.3 on 10.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from scipy import stats
from torch import Tensor

from moqe.errors import DataError
from moqe.progress import Advance
from moqe.router.examples import RoutingExamples
from moqe.router.router import Router, choose, realised_losses
from moqe.router.uncertainty import ClusteredMean, clustered_mean

Fit = Callable[[RoutingExamples, RoutingExamples], Router]  # (train, validation) -> router


@dataclass(frozen=True)
class Candidate:
    """How one way to fit a router, one of `compared` that had their chance, did on samples it had not seen.

    loss: of its choices, in what judges (see `RoutingExamples`). gain: that of the best single expert minus `loss`,
    sample by sample.
    """

    name: str
    loss: float
    gain: ClusteredMean
    compared: int

    @property
    def wins(self) -> bool:
        """Whether the gain clears the bar for so many candidates."""
        return self.gain.value > bar(self.compared, self.gain.documents) * self.gain.standard_error


def bar(compared: int, documents: int) -> float:
    """Standard errors that a gain must exceed, the best of `compared` candidates judged on so many documents.

    One candidate needs more than one standard error; see the head of this file for more of them. The standard error of
    one document is infinite, and so nothing exceeds it.
    """
    if compared == 1 or documents < 2:
        return 1.0
    freedom = documents - 1
    return float(stats.t.isf(stats.t.sf(1.0, freedom) / compared, freedom))


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


def split_folds(examples: RoutingExamples, fold: Tensor) -> Iterator[tuple[Tensor, RoutingExamples, RoutingExamples]]:
    """For each fold its rows, int64 (m,), and training and validation examples without its documents.

    The next fold is the validation set, the others are the training set; that takes at least three folds.
    """
    count = int(fold.max()) + 1
    for held_out in range(count):
        follower = (held_out + 1) % count
        training = torch.where((fold != held_out) & (fold != follower))[0]
        validation = torch.where(fold == follower)[0]
        yield torch.where(fold == held_out)[0], examples.select(training), examples.select(validation)


def predict_unseen(fit: Fit, examples: RoutingExamples, fold: Tensor, fold_done: Advance) -> Tensor:
    """Predicted costs of every sample by a router that has not seen its document: (n, experts).

    A router is fitted for each fold, see `split_folds`; `fold_done` is told after each.
    """
    costs = torch.zeros(examples.losses.shape, dtype=torch.float64)
    for rows, train, validation in split_folds(examples, fold):
        costs[rows] = fit(train, validation).predict(examples.select(rows).features).double().cpu()
        fold_done(1)
    return costs


def judge(name: str, costs: Tensor, examples: RoutingExamples, best_single: int, compared: int = 1) -> Candidate:
    """How the choices by predicted costs, (n, experts), compare with always taking `best_single`.

    compared: the number of candidates that are judged on these samples.
    """
    losses = examples.deciding.double().cpu()
    realised = realised_losses(losses, choose(costs))
    return Candidate(
        name, float(realised.mean()), clustered_mean(losses[:, best_single] - realised, examples.document), compared
    )


def better(costs: Tensor, others: Tensor, examples: RoutingExamples, compared: int = 1) -> bool:
    """Whether choices by `costs` beat those by `others`, (n, experts), by more than their difference's error.

    compared: of how many `costs` are the best on these examples, which raises the bar.
    """
    losses = examples.deciding.double().cpu()
    gain = realised_losses(losses, choose(others)) - realised_losses(losses, choose(costs))
    mean = clustered_mean(gain, examples.document)
    return mean.value > bar(compared, mean.documents) * mean.standard_error
