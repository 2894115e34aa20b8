import math

import pytest
import torch

from moqe.recipe import Balance
from moqe.router.balance import Gate, load_balancing_loss, overuse_bias, shares, usage_spread

# Probabilities 3/4 1/4, 3/4 1/4, 1/4 3/4: shares 2/3 1/3, mean probabilities 7/12 5/12.
GATED = torch.tensor([[3.0, 1.0], [3.0, 1.0], [1.0, 3.0]]).log()


def test_shares_by_hand():
    torch.testing.assert_close(shares(GATED), torch.tensor([2 / 3, 1 / 3]))


def test_load_balancing_loss_by_hand():
    assert float(load_balancing_loss(GATED)) == pytest.approx(2 * (7 / 12 * 2 / 3 + 5 / 12 * 1 / 3))


def test_load_balancing_loss_spans_one_to_the_number_of_experts():
    collapsed = torch.zeros(8, 4)
    collapsed[:, 2] = 100.0
    assert float(load_balancing_loss(collapsed)) == pytest.approx(4.0)
    assert float(load_balancing_loss(100.0 * torch.eye(4))) == pytest.approx(1.0)


def test_its_gradient_lowers_the_overused_expert():
    gated = GATED.clone().requires_grad_()
    load_balancing_loss(gated).backward()
    assert gated.grad is not None
    assert (gated.grad[:, 0] > 0).all()
    assert (gated.grad[:, 1] < 0).all()


def test_bias_and_spread_by_hand():
    usage = torch.tensor([0.7, 0.2, 0.1, 0.0])
    torch.testing.assert_close(overuse_bias(usage, 0.8), torch.tensor([-0.36, 0.0, 0.0, 0.0]))
    assert float(usage_spread(usage)) == pytest.approx(math.sqrt((0.45**2 + 0.05**2 + 0.15**2 + 0.25**2) / 4) / 0.25)
    assert float(usage_spread(torch.full((4,), 0.25))) == 0.0


def test_usage_is_a_moving_average():
    gate = Gate(2, Balance())
    torch.testing.assert_close(gate.usage, torch.tensor([0.5, 0.5]))
    gate.observe(GATED)
    torch.testing.assert_close(gate.usage, torch.tensor([0.8 * 0.5 + 0.2 * 2 / 3, 0.8 * 0.5 + 0.2 / 3]))
    torch.testing.assert_close(gate.bias, torch.tensor([-0.8 * (0.2 * 2 / 3 - 0.1), 0.0]))


def test_gate_without_noise_adds_the_bias_and_divides_by_the_temperature():
    gate = Gate(2, Balance(temperature=2.0))
    gate.usage.copy_(torch.tensor([0.75, 0.25]))
    torch.testing.assert_close(gate(GATED, 0.0), (GATED + torch.tensor([-0.2, 0.0])) / 2.0)


def test_noise_has_the_learnable_scale_and_is_annealed():
    torch.manual_seed(0)
    gate = Gate(2, Balance(noise_scale=1.0))
    zeros = torch.zeros(20000, 2)
    assert float(gate(zeros, 1.0).detach().std()) == pytest.approx(1.0, rel=0.02)
    assert float(gate(zeros, 0.25).detach().std()) == pytest.approx(0.25, rel=0.02)
    assert gate.noise_scale.requires_grad
    gate(zeros, 1.0).square().sum().backward()
    assert gate.noise_scale.grad is not None
    assert float(gate.noise_scale.grad) > 0
    assert not Gate(2, Balance(noise_scale=0.0)).noise_scale.requires_grad


def test_penalty_weighs_by_annealing_and_spread():
    gate = Gate(2, Balance(load_balancing_weight=0.1))
    gate.usage.copy_(torch.tensor([0.75, 0.25]))  # relative standard deviation 0.5
    assert float(gate.penalty(GATED, 0.5)) == pytest.approx(0.1 * 0.5 * 1.5 * float(load_balancing_loss(GATED)))
