"""The hand-written backward pass against autograd on the weights written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from moqe.methods.distill.scaled_linear import ScaledLinear
from moqe.methods.distill.scales import ScaleForm
from moqe.models.activations import quantize_activations


def a_form(offset: bool) -> ScaleForm:
    random = torch.Generator().manual_seed(5)
    step = torch.randint(-8, 8, (4, 3, 8), generator=random, dtype=torch.int8)
    scale = torch.rand(4, 3, generator=random) + 0.1
    if not offset:
        return ScaleForm(step, scale)
    lift = torch.randint(0, 4, (4, 3, 8), generator=random).float()
    return ScaleForm(step, scale, lift, torch.randn(4, 3, generator=random))


def written_out(linear: ScaledLinear, inputs: Tensor) -> Tensor:
    """The same layer with its weight as an ordinary tensor of the graph."""
    scale, offset = linear.current()
    weight = linear.step.float() * scale[..., None]
    if offset is not None:
        assert isinstance(linear.lift, Tensor)
        weight = weight + linear.lift * offset[..., None]
    bias = linear.bias if isinstance(linear.bias, Tensor) else None
    return nn.functional.linear(inputs, weight.flatten(1), bias)


@pytest.mark.parametrize("offset", [False, True])
def test_output_and_gradients_are_those_of_the_weights_written_out(offset: bool) -> None:
    linear = ScaledLinear(a_form(offset), torch.randn(4))
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.2)
    results = []
    for run in (linear, lambda inputs: written_out(linear, inputs)):
        inputs = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(1)).requires_grad_(True)
        linear.zero_grad()
        output = run(inputs)
        output.square().sum().backward()
        assert inputs.grad is not None
        results.append([output.detach(), inputs.grad, *(p.grad for p in linear.parameters() if p.grad is not None)])
    assert len(results[0]) == (4 if offset else 3)
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_an_untrained_layer_is_the_quantized_one() -> None:
    form = a_form(True)
    inputs = torch.randn(3, 24)
    assert torch.equal(ScaledLinear(form, None)(inputs), inputs @ form.weight().T)


def test_inputs_are_rounded_and_their_gradient_passes_straight_through() -> None:
    linear = ScaledLinear(a_form(False), None, activation_bits=8)
    inputs = torch.randn(3, 24, requires_grad=True)
    output = linear(inputs)
    rounded = quantize_activations(inputs.detach(), 8)
    torch.testing.assert_close(output.detach(), rounded @ a_form(False).weight().T)
    output.sum().backward()
    torch.testing.assert_close(inputs.grad, a_form(False).weight().sum(0).expand(3, 24))


def test_scales_keep_their_sign_whatever_is_trained() -> None:
    linear = ScaledLinear(a_form(False), None)
    with torch.no_grad():
        linear.log_scale.fill_(-50.0)
    assert bool((linear.current()[0] > 0).all())
