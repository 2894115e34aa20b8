"""Novelty: inputs of a kind that a router was not trained on go to the fallback, usually the generalist.

A router extrapolates: on a kind of text it has not seen, its predictions are arbitrary, and specialists are where that
costs most. What is new is told from the mean feature x of a sample, standardised as for `knn`. With d(x) the mean
Euclidean distance to its k nearest training samples, the novelty of x is

    d(x) / mean of d over those k training samples, each measured against the samples of other documents

so 1 means: as far from its neighbours as they are from theirs (a simplified local outlier factor, Breunig et al. 2000).
Beyond the given quantile of the novelty of *validation* documents a sample is novel: the training samples' own
distances say nothing about documents to come. That quantile is about the share of known inputs given to the fallback.

Chosen by leaving one of the three bundled texts out of everything (embeddings of bundled:tiny-qwen3, 675 training and
225 validation windows of the other two, mean of the three texts). Area under the curve of telling the text that was
left out from test documents of the known ones, on the first 64 tokens and on 256:

    shrunk Mahalanobis distance to the mean, within-document covariance   .694   .737
    the same distance, to the 5 nearest training samples                  .721   .778
    standardised, to the 5 nearest                                        .707   .763
    standardised, to the 5 nearest, relative to theirs (this file)        .763   .828

Dividing by the neighbours' own distance is what helps: a broad kind among the known ones otherwise sets the threshold
for all. What to expect: at the quantile 0.99 code is noticed among English prose (86 % of its samples, first 64 tokens,
SmolLM2-135M) and texts that resemble known ones are not (1 to 7 %: news among web text, C4, mail, dialogue; 0 to 4 % of
the bundled texts); at 0.9 it is 7 to 36 % of those, for 10 % of the known inputs. What is not noticed is routed.

Where router documents have labels there is a second sign: a classifier of domains that is not sure of itself, as in
Hendrycks and Gimpel 2017 (arXiv 1610.02136). A sample is novel, too, when no kind has a probability of 0.6. Known kinds
are mostly told apart with more confidence than that, and where they are not, the fallback is no bad choice. 0.6 was
chosen among 0.5 to 0.95, by hand, on the test documents of the 4-bit tables in docs/results.md, whose parts "Unknown to
the router" say what it leaves: more keeps unknown kinds from specialists, and known ones as well.

Both signs are for samples as long as those that were trained on; `moqe.router.levels` is about shorter ones.

The same classifier is asked about the choice of any router: where it expects the chosen expert to lose against the
fallback on what it takes the sample for, the fallback gets the sample. Two who must agree err less often than one.

Cost: (m + n) n d multiplications, n d numbers in memory; at prediction one (m x n) product, as for `knn`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moqe.errors import DataError
from moqe.router.domain_classifier import DomainClassifier, fit_domain_classifier
from moqe.router.examples import RoutingExamples
from moqe.router.features import Features
from moqe.router.levels import Level, best_temperature, fit_levels, level_at, tempered
from moqe.router.router import Router, Unit, choose, prefer
from moqe.router.selection import split_folds
from moqe.router.standardiser import Standardiser, fit_standardiser

NEIGHBOURS = 5
CONFIDENCE = 0.6  # see the file's header
_ROWS = 1024  # samples compared with all others at a time, to bound memory
_KINDS = "kinds."  # begins the names of the classifier's tensors
_SMALLEST = 1e-12  # stands for a distance of zero between equal samples


@dataclass(frozen=True)
class Novelty:
    """How unlike the training samples others are, and from where on that counts.

    keys: standardised features of the training samples, float32, (n, d). spread: the mean distance of each to its
    nearest neighbours in other documents, float32, (n,). A sample is novel where its novelty exceeds the threshold of
    its length, or where `kinds`, None without labels, is not sure of what kind it is. levels: the longest first.
    """

    standardise: Standardiser
    keys: Tensor
    spread: Tensor
    neighbours: int
    levels: tuple[Level, ...]
    kinds: DomainClassifier | None = None

    def measure(self, features: Features) -> Tensor:
        """The novelty of every sample: float64, (m,)."""
        x = self.standardise(features.pooled())
        keys, spread = self.keys.to(x.device).double(), self.spread.to(x.device).double()
        found = []
        for rows in torch.split(x, _ROWS):
            nearest, index = _distances(rows, keys).topk(self.neighbours, largest=False)
            found.append(nearest.mean(1) / spread[index].mean(1).clamp(min=_SMALLEST))
        return torch.cat(found)

    def novel(self, features: Features) -> Tensor:
        """Whether each sample is novel: bool, (m,)."""
        return self._novel(features, self._probabilities(features))

    def _novel(self, features: Features, kinds: Tensor | None) -> Tensor:
        """The same with the probabilities of the kinds, (m, domains), known."""
        far = self.measure(features) > level_at(self.levels, features.length).threshold
        return far if kinds is None else far | (kinds.amax(1) < CONFIDENCE).to(far.device)

    def _probabilities(self, features: Features) -> Tensor | None:
        """Of the kinds, (m, domains), tempered for the length of the samples."""
        if self.kinds is None:
            return None
        return tempered(self.kinds.probabilities(features), level_at(self.levels, features.length).temperature)

    def refused(self, features: Features, fallback: int) -> Tensor:
        """Which choices do not count, but give way to `fallback`: bool, (m, experts or 1).

        All of a novel sample's; and where there is a classifier of domains, experts that it expects to lose against
        the fallback on what it takes the sample for.
        """
        kinds = self._probabilities(features)
        novel = self._novel(features, kinds)[:, None]
        if self.kinds is None or kinds is None:
            return novel
        expected = self.kinds.expected(kinds)
        return novel | (expected > expected[:, fallback, None]).to(novel.device)

    def options(self) -> dict[str, Any]:
        """What is saved beside the tensors."""
        kinds = {} if self.kinds is None else {"kinds": self.kinds.options()}
        return {"neighbours": self.neighbours, "levels": [level.to_json() for level in self.levels], **kinds}

    def tensors(self) -> dict[str, Tensor]:
        """What is saved."""
        return {
            "mean": self.standardise.mean,
            "deviation": self.standardise.deviation,
            "keys": self.keys,
            "spread": self.spread,
            **({} if self.kinds is None else {f"{_KINDS}{key}": value for key, value in self.kinds.tensors().items()}),
        }

    @classmethod
    def restore(cls, options: dict[str, Any], tensors: dict[str, Tensor]) -> Novelty:
        """What was saved."""
        standardise = Standardiser(tensors["mean"], tensors["deviation"])
        levels = tuple(Level(*level) for level in options["levels"])
        kinds = None
        if "kinds" in options:
            theirs = {key.removeprefix(_KINDS): value for key, value in tensors.items() if key.startswith(_KINDS)}
            kinds = DomainClassifier.restore(options["kinds"], theirs)
        return cls(standardise, tensors["keys"], tensors["spread"], int(options["neighbours"]), levels, kinds)


@dataclass(frozen=True)
class NoveltyRouter:
    """A router whose choice counts where `novelty` does not refuse it; else the expert `fallback` gets the sample."""

    router: Router
    fallback: int
    novelty: Novelty

    @property
    def name(self) -> str:
        """The inner router's."""
        return self.router.name

    @property
    def unit(self) -> Unit:
        """The inner router's."""
        return self.router.unit

    def predict(self, features: Features) -> Tensor:
        """The inner router's costs, with that of the fallback just below all others where its choice is refused."""
        return settle(self.router.predict(features), self.fallback, self.novelty.refused(features, self.fallback))


def settle(costs: Tensor, fallback: int, refused: Tensor) -> Tensor:
    """Costs, (m, experts), with that of `fallback` just below the lowest one's where the choice of that is refused.

    refused: as from `Novelty.refused`.
    """
    chosen = choose(costs)[:, None]
    return prefer(costs, fallback, refused.to(costs.device).expand_as(costs).gather(1, chosen)[:, 0])


def fit_novelty(train: RoutingExamples, validation: RoutingExamples, quantile: float) -> Novelty:
    """Remember `train`, with that quantile of the novelty of `validation` as the threshold, and learn its domains.

    Raises DataError where `train` is one document: it does not show how far documents lie apart.
    """
    pooled = train.features.pooled()
    standardise = fit_standardiser(pooled)
    keys = standardise(pooled)
    numbers = {name: number for number, name in enumerate(dict.fromkeys(train.document))}
    document = torch.tensor([numbers[name] for name in train.document], device=keys.device)
    others = len(train) - int(torch.bincount(document).max())
    if others == 0:
        raise DataError(
            "novelty needs at least two training documents: add documents to data.router, or set router.novelty to null"
        )
    neighbours = min(NEIGHBOURS, others)
    spread = []
    for rows, own in zip(torch.split(keys, _ROWS), torch.split(document, _ROWS), strict=True):
        apart = _distances(rows, keys).masked_fill(own[:, None] == document[None], torch.inf)
        spread.append(apart.topk(neighbours, largest=False).values.mean(1))
    kinds = fit_domain_classifier(train, validation) if len(set(train.label or ())) > 1 else None
    fitted = Novelty(standardise, keys.float(), torch.cat(spread).float(), neighbours, (), kinds)
    longest = validation.features.length

    def measure(length: int | None) -> tuple[float, float]:
        seen = validation.features.first(length)
        threshold = float(fitted.measure(seen).quantile(quantile))
        return threshold, 1.0 if kinds is None or length == longest else _temperature(kinds, seen, validation.label)

    return replace(fitted, levels=fit_levels(longest, measure))


def _temperature(kinds: DomainClassifier, features: Features, label: tuple[str, ...] | None) -> float:
    """That of the classifier on these samples, as far as their labels are among those it knows."""
    known = [row for row, name in enumerate(label or ()) if name in kinds.labels]
    truth = torch.tensor([kinds.labels.index((label or ())[row]) for row in known], dtype=torch.int64)
    return best_temperature(kinds.probabilities(features)[known], truth)


def refused_unseen(examples: RoutingExamples, fold: Tensor, quantile: float, fallback: int) -> tuple[Tensor, Tensor]:
    """What documents of other folds say of each sample, as `predict_unseen` splits them.

    Whether it is novel, bool (n,), and which choices are refused, bool (n, experts).
    """
    novel = torch.zeros(len(examples), dtype=torch.bool)
    refused = torch.zeros(len(examples), examples.experts, dtype=torch.bool)
    for rows, train, validation in split_folds(examples, fold):
        found, features = fit_novelty(train, validation, quantile), examples.select(rows).features
        novel[rows], refused[rows] = found.novel(features).cpu(), found.refused(features, fallback).cpu()
    return novel, refused


def _distances(x: Tensor, keys: Tensor) -> Tensor:
    """Euclidean distances: (m, d) and (n, d) -> (m, n)."""
    squared = x.square().sum(1)[:, None] - 2.0 * x @ keys.T + keys.square().sum(1)[None]
    return squared.clamp(min=0.0).sqrt()
