"""Logistic regression on what choices cost, against scipy's minimiser and by what it must and must not learn."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import softmax

from moqe.router import RoutingExamples, VectorFeatures, choose, realised_losses
from moqe.router.linear_scores import OFFSET_SHARE
from moqe.router.logistic import STRENGTHS, Logistic, _path, fit_logistic


def random_examples(n: int, dimension: int, experts: int, seed: int) -> RoutingExamples:
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(n, dimension, generator=generator)
    losses = 3.0 - 0.1 * vectors @ torch.randn(dimension, experts, generator=generator)
    losses += 0.05 * torch.randn(n, experts, generator=generator)
    return RoutingExamples(VectorFeatures(vectors), losses, tuple(str(row) for row in range(n)))


def objective(flat: np.ndarray, x: np.ndarray, losses: np.ndarray, strength: float) -> float:
    """The header's formula, written again."""
    parameters = flat.reshape(-1, losses.shape[1])
    weight, offset = parameters[:-1], parameters[-1]
    probabilities = softmax(x @ weight + offset, axis=1)
    held = (weight**2).sum() + OFFSET_SHARE * (offset**2).sum()
    return float((probabilities * losses).sum(1).mean() + strength / 2 * held)


def test_it_finds_the_minimum_that_scipy_finds():
    examples = random_examples(50, 4, 3, 0)
    x = examples.features.pooled().double()
    x = ((x - x.mean(0)) / x.std(0, correction=0)).numpy()
    losses = examples.centred.numpy() / np.sqrt((examples.centred.numpy() ** 2).mean())
    found, start = _path(examples, STRENGTHS[:3]), np.zeros(5 * 3)
    for router, strength in zip(found, STRENGTHS, strict=False):
        theirs = minimize(objective, start, (x, losses, strength), method="BFGS", options={"gtol": 1e-9})
        start = theirs.x
        ours = torch.cat([router.weight, router.offset[None]]).numpy()
        assert objective(ours.ravel(), x, losses, strength) == pytest.approx(theirs.fun, abs=1e-9)
        assert ours == pytest.approx(theirs.x.reshape(-1, 3), abs=1e-4)


def test_with_more_dimensions_than_samples_the_gradient_vanishes_in_all_of_them():
    """The search runs in the span of the samples; the minimum over all dimensions lies there."""
    examples = random_examples(12, 30, 3, 1)
    for router in _path(examples, STRENGTHS[:3]):
        weight, offset = router.weight.clone().requires_grad_(), router.offset.clone().requires_grad_()
        x = router.standardise(examples.features.pooled())
        losses = examples.centred / examples.centred.square().mean().sqrt()
        held = weight.square().sum() + OFFSET_SHARE * offset.square().sum()
        value = ((x @ weight + offset).softmax(1) * losses).sum(1).mean() + router.strength / 2 * held
        value.backward()
        assert weight.shape == (30, 3)
        assert float(weight.grad.abs().max()) < 1e-6
        assert float(offset.grad.abs().max()) < 1e-6


def test_samples_on_which_experts_hardly_differ_hardly_count():
    """Nine samples say expert 0 by a hair where the tenth says expert 1 by far; a hard label would follow the nine."""
    losses = torch.tensor([[1.0, 1.001]] * 9 + [[2.0, 1.0]]).repeat(8, 1)
    examples = RoutingExamples(VectorFeatures(torch.ones(80, 2)), losses, tuple(str(row) for row in range(80)))
    assert set(choose(fit_logistic(examples, examples).predict(examples.features)).tolist()) == {1}


def test_it_finds_a_planted_signal_and_keeps_its_head_without_one(planted):
    train, validation, test = planted(160, 0.1, 1), planted(60, 0.1, 2), planted(200, 0.1, 3)
    router = fit_logistic(train, validation)
    chosen = choose(router.predict(test.features))
    best = float(test.losses[:, validation.best_single].mean())
    assert float(realised_losses(test.losses, chosen).mean()) < best - 0.04
    assert (router.name, router.unit, router.kind) == ("logistic", "logit", "logistic")
    plain = planted(160, 0.0, 4), planted(60, 0.0, 5)
    for part in plain:
        part.losses[:, 1] -= 0.2
    sure = fit_logistic(*plain)
    assert sure.strength == max(STRENGTHS)
    assert set(choose(sure.predict(test.features)).tolist()) == {1}
    assert bool(torch.isfinite(sure.offset).all())


def test_experts_that_are_all_equal_are_no_error(planted):
    train = planted(20, 0.0, 1, noise=0.0)
    router = fit_logistic(train, train)
    assert float(router.weight.abs().max()) == float(router.offset.abs().max()) == 0.0


def test_refitting_keeps_the_strength_and_two_fits_are_equal(planted):
    train, validation = planted(60, 0.1, 10), planted(30, 0.1, 11)
    one, two = fit_logistic(train, validation), fit_logistic(train, validation)
    assert torch.equal(one.weight, two.weight)
    again = one.refit(train.join(validation))
    assert isinstance(again, Logistic)
    assert again.strength == one.strength
    assert not torch.equal(again.weight, one.weight)
    assert torch.equal(one.refit(train).weight, one.weight)


def test_what_judges_decides_on_the_strength():
    """Trained on one thing and judged by its opposite, the least sure of itself is taken."""
    train = random_examples(60, 3, 2, 3)
    opposite = RoutingExamples(train.features, train.losses, train.document, judged=-train.losses)
    assert fit_logistic(train, train).strength < max(STRENGTHS)
    chosen = fit_logistic(train, opposite)
    losses = [
        float(realised_losses(opposite.deciding, choose(one.predict(train.features))).mean())
        for one in _path(train, STRENGTHS)
    ]
    assert chosen.strength == STRENGTHS[losses.index(min(losses))]
