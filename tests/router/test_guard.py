import math

import pytest
import torch

from moqe.router import GuardedRouter, choose, guard
from moqe.router.baselines import Constant
from moqe.router.guard import decide
from moqe.router.linear import fit_linear

EXPERTS, SAMPLES, PER_DOCUMENT = 4, 120, 4
DOCUMENT = [str(i // PER_DOCUMENT) for i in range(SAMPLES)]


def noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Fixed:
    name, unit = "fixed", "nats"

    def __init__(self, costs: torch.Tensor) -> None:
        self.costs = costs

    def predict(self, features) -> torch.Tensor:
        return self.costs


def test_predictions_of_noise_are_nearly_never_kept():
    kept = 0
    for seed in range(100):
        losses = 3.0 + 0.05 * noise(2 * seed, SAMPLES, EXPERTS)
        decision = decide(noise(2 * seed + 1, SAMPLES, EXPERTS), losses, DOCUMENT, int(losses.mean(0).argmin()))
        kept += decision.kept
    assert kept <= 5


def test_predictions_that_hold_are_always_kept_and_gain_what_the_decision_says():
    for seed in range(20):
        signal = 0.05 * noise(3 * seed, SAMPLES, EXPERTS)
        losses = 3.0 + signal + 0.05 * noise(3 * seed + 1, SAMPLES, EXPERTS)
        costs = signal + 0.02 * noise(3 * seed + 2, SAMPLES, EXPERTS)
        fallback = int(losses.mean(0).argmin())
        decision = decide(costs, losses, DOCUMENT, fallback)
        assert decision.kept
        assert decision.gain.value > decision.gain.standard_error
        chosen = choose(GuardedRouter(Fixed(costs), fallback, decision.margin).predict(None))
        realised = losses.gather(1, chosen[:, None])[:, 0]
        assert float((losses[:, fallback] - realised).mean()) == pytest.approx(decision.gain.value, abs=1e-6)
        assert float((chosen != fallback).float().mean()) == pytest.approx(decision.switched)


def test_a_router_that_is_right_only_where_it_is_sure_gets_a_margin():
    """Every fourth sample is truly better elsewhere, and predicted so by far; on the rest the router is a bit wrong."""
    losses, costs = torch.full((SAMPLES, 2), 3.0), torch.zeros(SAMPLES, 2)
    losses[:, 1] += 0.02
    costs[:, 1] = -0.01 - 0.001 * torch.arange(SAMPLES) / SAMPLES
    losses[::4, 1], costs[::4, 1] = 2.95, -0.1
    losses += 0.001 * noise(1, SAMPLES, 2)
    decision = decide(costs, losses, DOCUMENT, 0)
    assert decision.kept
    assert 0.01 < decision.margin < 0.1
    assert decision.switched == pytest.approx(0.25)


def test_the_largest_margin_that_is_not_worse_is_taken():
    """Three quarters of the switches change nothing; the surest quarter holds all the gain."""
    losses, costs = torch.full((SAMPLES, 2), 3.0), torch.zeros(SAMPLES, 2)
    costs[:, 1] = -0.01 - 0.001 * torch.arange(SAMPLES) / SAMPLES
    losses[::4, 1], costs[::4, 1] = 2.95, -0.1
    decision = decide(costs, losses, DOCUMENT, 0)
    assert decision.switched == pytest.approx(0.25)
    assert decision.gain.value == pytest.approx(0.05 / 4, rel=1e-5)


def test_a_router_that_never_leaves_the_fallback_is_not_kept():
    costs = torch.zeros(SAMPLES, EXPERTS)
    costs[:, 2] = -1.0
    decision = decide(costs, noise(0, SAMPLES, EXPERTS), DOCUMENT, 2)
    assert not decision.kept
    assert decision.switched == 0.0


def test_one_document_is_no_evidence():
    losses = torch.tensor([[3.0, 1.0]] * 10)
    decision = decide(-losses.flip(1), losses, ["same"] * 10, 0)
    assert math.isinf(decision.gain.standard_error)
    assert not decision.kept


def test_a_gain_of_exactly_the_margin_does_not_switch():
    costs = torch.tensor([[1.0, 1.5], [1.0, 1.75]])
    assert choose(GuardedRouter(Fixed(costs), 1, 0.5).predict(None)).tolist() == [1, 0]
    assert choose(GuardedRouter(Fixed(costs[:1, [1, 0]]), 0, 0.5).predict(None)).tolist() == [0]
    assert torch.equal(costs, torch.tensor([[1.0, 1.5], [1.0, 1.75]]))


def test_falling_back_gives_the_best_single_expert_of_validation(planted):
    train, validation = planted(80, 0.0, 1), planted(80, 0.0, 2)
    router, decision = guard(Fixed(noise(5, 80, 3)), validation)
    assert not decision.kept
    assert isinstance(router, Constant)
    assert set(choose(router.predict(train.features)).tolist()) == {validation.best_single}


def test_a_planted_signal_is_kept(planted):
    router, decision = guard(fit_linear(planted(160, 0.1, 1), planted(60, 0.1, 2)), planted(100, 0.1, 3))
    assert decision.kept
    assert isinstance(router, GuardedRouter)
    assert router.name == "linear"
    assert router.unit == "nats"
