import math

import pytest
import torch

from moqe.router.objectives import OBJECTIVES, centred_regression, cross_entropy, expected_loss

LOGITS = torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0]])  # probabilities 3/4 1/4 and 1/2 1/2
LOSSES = torch.tensor([[1.0, 2.0], [5.0, 3.0]])


def test_cross_entropy_of_the_best_expert():
    assert float(cross_entropy(LOGITS, LOSSES)) == pytest.approx((math.log(4 / 3) + math.log(2)) / 2)


def test_expected_loss_relative_to_the_mean():
    # first sample: 3/4 * -0.5 + 1/4 * 0.5 = -0.25; second: 0
    assert float(expected_loss(LOGITS, LOSSES)) == pytest.approx(-0.125)


def test_centred_regression():
    logits = torch.tensor([[0.5, 0.0], [-1.0, 1.0]])  # predicted costs -0.5, 0 and 1, -1; targets -0.5, 0.5 and 1, -1
    assert float(centred_regression(logits, LOSSES)) == pytest.approx(0.25 / 4)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_step_downhill_raises_the_best_experts_logit(name):
    generator = torch.Generator().manual_seed(0)
    losses = torch.rand(50, 4, generator=generator)
    logits = torch.zeros(50, 4, requires_grad=True)
    OBJECTIVES[name](logits, losses).backward()
    assert logits.grad is not None
    assert torch.equal((-logits.grad).argmax(1), losses.argmin(1))
    torch.testing.assert_close(logits.grad.sum(1), torch.zeros(50), atol=1e-7, rtol=0)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_how_hard_a_sample_is_does_not_matter(name):
    generator = torch.Generator().manual_seed(1)
    losses, logits = torch.rand(9, 3, generator=generator), torch.randn(9, 3, generator=generator)
    shifted = losses + torch.arange(9.0)[:, None]
    torch.testing.assert_close(OBJECTIVES[name](logits, losses), OBJECTIVES[name](logits, shifted))


def test_experts_that_tie_share_the_label():
    losses = torch.tensor([[0.0, 1.0, 0.0]])
    logits = torch.tensor([[0.3, -0.2, 1.1]], requires_grad=True)
    cross_entropy(logits, losses).backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, logits.detach().softmax(1) - torch.tensor([[0.5, 0.0, 0.5]]))
