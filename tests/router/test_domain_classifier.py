"""The classifier of domains, against scipy's minimiser and by what it collects of what true labels would."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import log_softmax

from moqe.errors import DataError
from moqe.router import RoutingExamples, VectorFeatures, choose, realised_losses
from moqe.router.domain_classifier import DomainClassifier, _fit, fit_domain_classifier
from moqe.router.linear_scores import OFFSET_SHARE
from moqe.router.logistic import fit_logistic


def examples_of_domains(n: int, seed: int, gain: float = 0.02, noise: float = 0.05) -> RoutingExamples:
    """Four domains around centres of their own; expert d + 1 is better on domain d, and expert 0 nowhere."""
    centres = torch.randn(4, 12, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    domain = torch.randint(0, 4, (n,), generator=generator)
    vectors = centres[domain] + torch.randn(n, 12, generator=generator)
    losses = 3.0 + torch.randn(n, 1, generator=generator) + noise * torch.randn(n, 5, generator=generator)
    losses[torch.arange(n), domain + 1] -= gain
    label = tuple("abcd"[number] for number in domain.tolist())
    return RoutingExamples(VectorFeatures(vectors), losses, tuple(map(str, range(n))), None, label)


def test_it_finds_the_minimum_that_scipy_finds():
    examples, strength = examples_of_domains(60, 1), 0.03
    x = examples.features.pooled().double()
    x = ((x - x.mean(0)) / x.std(0, correction=0)).numpy()
    truth = np.array(["abcd".index(label) for label in examples.label])

    def objective(flat: np.ndarray) -> float:
        weight, offset = flat.reshape(13, 4)[:-1], flat.reshape(13, 4)[-1]
        entropy = -log_softmax(x @ weight + offset, axis=1)[np.arange(60), truth].mean()
        return float(entropy + strength / 2 * ((weight**2).sum() + OFFSET_SHARE * (offset**2).sum()))

    theirs = minimize(objective, np.zeros(13 * 4), method="BFGS", options={"gtol": 1e-9})
    found = _fit(examples, strength)
    ours = torch.cat([found.weight, found.offset[None]]).numpy()
    assert objective(ours.ravel()) == pytest.approx(theirs.fun, abs=1e-7)
    assert ours == pytest.approx(theirs.x.reshape(13, 4), abs=1e-3)


def test_it_collects_nearly_all_that_labels_would_and_more_than_losses_alone_teach():
    train, validation, test = (examples_of_domains(n, seed) for n, seed in ((240, 2), (80, 3), (2000, 4)))
    by_label = {label: int(train.centred[[one == label for one in train.label]].mean(0).argmin()) for label in "abcd"}
    always = test.losses[:, 0].mean()
    label = realised_losses(test.losses, torch.tensor([by_label[one] for one in test.label])).mean()
    collected = {}
    for name, fit in (("classifier", fit_domain_classifier), ("logistic", fit_logistic)):
        choice = choose(fit(train, validation).predict(test.features))
        collected[name] = float((always - realised_losses(test.losses, choice).mean()) / (always - label))
    assert collected["classifier"] > 0.85
    assert collected["classifier"] > collected["logistic"]


def test_probabilities_are_calibrated_on_labels_that_say_nothing():
    train = replace(examples_of_domains(200, 5), label=tuple("xy"[row % 2] for row in range(200)))
    validation = replace(examples_of_domains(200, 6), label=tuple("xy"[row % 2] for row in range(200)))
    found = fit_domain_classifier(train, validation)
    probabilities = found.probabilities(validation.features)
    assert torch.allclose(probabilities.sum(1), torch.ones(200, dtype=torch.float64))
    assert float((probabilities - 0.5).abs().max()) < 0.35


def test_a_domain_of_validation_that_training_lacks_is_no_obstacle():
    train, validation = examples_of_domains(100, 7), examples_of_domains(40, 8)
    strange = replace(validation, label=tuple("z" if one == "a" else one for one in validation.label))
    assert isinstance(fit_domain_classifier(train, strange), DomainClassifier)


@pytest.mark.parametrize("label", [None, ("a",) * 30])
def test_without_two_domains_there_is_nothing_to_classify(label: tuple[str, ...] | None):
    examples = replace(examples_of_domains(30, 9), label=label)
    with pytest.raises(DataError, match="two domains"):
        fit_domain_classifier(examples, examples)


def test_labels_stay_with_their_samples():
    one, other = examples_of_domains(5, 1), examples_of_domains(4, 2)
    assert one.join(other).label == one.label + other.label
    assert one.select(torch.tensor([3, 1])).label == (one.label[3], one.label[1])
    assert one.join(replace(other, label=None)).label is None
    with pytest.raises(DataError, match="labels do not belong"):
        replace(one, label=("a",))
