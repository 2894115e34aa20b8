"""Which kind of text is it? A classifier of domains, and for each domain what every expert costs on it.

Specialists are made for domains, and a domain is easier to tell from an embedding than which of several experts will do
better by a hundredth of a nat on one text. With q = softmax(x W + b) the probabilities of the domains and m_d the mean
centred losses of the experts on the training samples of domain d, the predicted costs of a sample are

    sum over domains of q_d m_d

W and b minimise the mean cross-entropy with the training samples' labels plus strength / 2 (|W|^2 + |b|^2 / 100); the
strength is the one with the lowest cross-entropy on validation. Labels are needed to train it and not to use it.
It is no better than the labels: where experts differ within a domain it sees nothing.

Standard multinomial logistic regression.
Cost: n d domains multiplications per evaluation, some dozens of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from moqe.errors import DataError
from moqe.router.examples import RoutingExamples
from moqe.router.features import Features
from moqe.router.linear_scores import Basis, LinearScores, saved_scores
from moqe.router.router import Unit

STRENGTHS = tuple(10.0 ** (exponent / 2) for exponent in range(0, -7, -1))  # 1 down to 0.001
ITERATIONS = 100


@dataclass(frozen=True)
class DomainClassifier(LinearScores):
    """Costs = softmax(scores) @ costs, one score per domain.

    costs: mean centred losses, float64 (domains, experts). labels: the domains' names.
    """

    costs: Tensor
    labels: tuple[str, ...]
    kind: ClassVar[str] = "domain-classifier"
    name: ClassVar[str] = "domain-classifier"
    unit: ClassVar[Unit] = "nats"

    def predict(self, features: Features) -> Tensor:
        """See `Router`."""
        return self.expected(self.probabilities(features))

    def expected(self, probabilities: Tensor) -> Tensor:
        """The experts' costs given what `probabilities` says: float32 (n, experts)."""
        return (probabilities @ self.costs.to(probabilities.device)).float()

    def probabilities(self, features: Features) -> Tensor:
        """Of every domain, float64 (n, domains)."""
        return self.scores(features).softmax(-1)

    def refit(self, examples: RoutingExamples) -> DomainClassifier:
        """The same strength on other examples."""
        return _fit(examples, self.strength)

    def options(self) -> dict[str, Any]:
        """What is saved beside the tensors."""
        return {"strength": self.strength, "labels": list(self.labels)}

    def tensors(self) -> dict[str, Tensor]:
        """What is saved."""
        return super().tensors() | {"costs": self.costs}

    @classmethod
    def restore(cls, options: dict[str, Any], tensors: dict[str, Tensor]) -> DomainClassifier:
        """The router that was saved."""
        return cls(*saved_scores(tensors), options["strength"], tensors["costs"], tuple(options["labels"]))


def fit_domain_classifier(train: RoutingExamples, validation: RoutingExamples) -> DomainClassifier:
    """Fit on `train`, with the strength that names the domains of `validation` best.

    Raises DataError where examples have no labels, or only one.
    """
    candidates = [_fit(train, strength) for strength in STRENGTHS]
    known = [row for row, label in enumerate(validation.label or ()) if label in candidates[0].labels]
    if not known:
        return candidates[0]
    unseen = validation.select(torch.tensor(known))
    truth = _numbers(unseen, candidates[0].labels)
    entropies = [
        float(nn.functional.nll_loss(one.probabilities(unseen.features).clamp_min(1e-12).log().cpu(), truth))
        for one in candidates
    ]
    return candidates[entropies.index(min(entropies))]


def _fit(examples: RoutingExamples, strength: float) -> DomainClassifier:
    labels = tuple(sorted(set(examples.label or ())))
    if len(labels) < 2:
        raise DataError("a classifier of domains needs router documents of two domains at least")
    basis = Basis.of(examples)
    truth = _numbers(examples, labels).to(basis.left.device)
    found = basis.minimise(
        lambda scores: nn.functional.cross_entropy(scores, truth), basis.zeros(len(labels)), strength, ITERATIONS
    )
    centred = examples.centred.to(truth.device)
    costs = torch.stack([centred[truth == number].mean(0) for number in range(len(labels))])
    return DomainClassifier(*basis.back(found), strength, costs, labels)


def _numbers(examples: RoutingExamples, labels: tuple[str, ...]) -> Tensor:
    """The number of each example's label, int64 (n,)."""
    return torch.tensor([labels.index(label) for label in examples.label or ()])
