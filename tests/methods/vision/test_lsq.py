"""Learned steps: the gradient of the paper, case by case."""

from __future__ import annotations

import math

import pytest
import torch

from moqe.methods.vision.lsq import SMALLEST_STEP, LearnedStep


def test_gradients_equal_the_papers_formula() -> None:
    step = LearnedStep(torch.tensor(0.5), lowest=-2, highest=3, count=7)
    value = torch.tensor([-3.0, -1.0, -0.6, 0.1, 0.4, 0.5, 2.0], requires_grad=True)  # / 0.5: -6 -2 -1.2 0.2 0.8 1 4
    made = step(value)
    assert made.tolist() == [-1.0, -1.0, -0.5, 0.0, 0.5, 0.5, 1.5]
    incoming = torch.tensor([1.0, 10.0, 100.0, 1000.0, 1e4, 1e5, 1e6])
    made.backward(incoming)
    assert value.grad is not None
    assert value.grad.tolist() == [0.0, 0.0, 100.0, 1000.0, 1e4, 1e5, 0.0]
    # outside or at an end: the code there; inside: round(v / s) - v / s
    share = torch.tensor([-2.0, -2.0, -1 + 1.2, 0 - 0.2, 1 - 0.8, 1 - 1, 3.0])
    expected = float((share.double() * incoming).sum()) / math.sqrt(7 * 3)
    assert float(step.step.grad) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("block", [0, 2])
def test_every_channel_or_block_has_its_own_step(block: int) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (4, 2, 3, 3) if block else (4,)
    steps = torch.rand(shape, generator=generator) + 0.2
    value = torch.randn(4, 3, 3, 3, generator=generator)
    incoming = torch.randn(4, 3, 3, 3, generator=generator)
    whole = LearnedStep(steps, -8, 7, 5, block)
    made = whole(value)
    made.backward(incoming)
    codes, scale = whole.codes(value)
    assert torch.equal(scale, steps)
    spread = steps.repeat_interleave(2, 1)[:, :3] if block else steps.view(4, 1, 1, 1)
    torch.testing.assert_close(codes * spread, made.detach())
    for index in torch.cartesian_prod(*[torch.arange(n) for n in shape]).view(-1, len(shape)).tolist():
        place = (index[0], slice(2 * index[1], 2 * index[1] + 2), *index[2:]) if block else (index[0],)
        alone = LearnedStep(steps[tuple(index)], -8, 7, 5)
        alone(value[place]).backward(incoming[place])
        assert whole.step.grad is not None
        torch.testing.assert_close(whole.step.grad[tuple(index)], alone.step.grad, rtol=1e-4, atol=1e-5)


def test_gradients_do_not_depend_on_the_memory_layout() -> None:
    generator = torch.Generator().manual_seed(1)
    value, incoming = (torch.randn(2, 3, 4, 5, generator=generator) for _ in range(2))
    gradients = []
    for layout in (torch.contiguous_format, torch.channels_last):
        step = LearnedStep(torch.tensor(0.3), 0, 15, 60)
        step(value.contiguous(memory_format=layout)).backward(incoming.contiguous(memory_format=layout))
        gradients.append(step.step.grad)
    torch.testing.assert_close(*gradients)


def test_steps_stay_positive() -> None:
    step = LearnedStep(torch.tensor([0.1, -0.2]), -8, 7, 1)
    step.keep_positive()
    assert step.step.tolist() == [pytest.approx(0.1), pytest.approx(SMALLEST_STEP)]
