"""smoothquant: equation 4, an unchanged product, and less error once activations are rounded."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moqe.errors import NumericalError
from moqe.methods.grids import searched_grid
from moqe.methods.smoothquant import SmoothQuant, smoothing_scale
from moqe.methods.statistics import accumulate
from moqe.recipe import Expert
from moqe.schemes import scheme

EXPERT = Expert(name="x", method="smoothquant", scheme="w8a8")


def data(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(200, 64, generator=generator)
    inputs[:, torch.randperm(64, generator=generator)[:2]] *= 60
    return inputs, torch.randn(32, 64, generator=generator) * 0.05


def per_token(inputs: Tensor) -> Tensor:
    step = inputs.abs().amax(1, keepdim=True) / 127
    return (inputs / step).round() * step


@settings(max_examples=15, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000), alpha=st.floats(0.0, 1.0))
def test_the_product_is_unchanged(seed: int, alpha: float) -> None:
    inputs, weight = data(seed)
    scale = smoothing_scale([weight], inputs.abs().amax(0), alpha)
    product = (inputs / scale) @ (weight * scale).T
    torch.testing.assert_close(product, inputs @ weight.T, rtol=1e-4, atol=1e-3)


def test_equation_four_with_the_maximum_over_linears() -> None:
    one, two = torch.tensor([[1.0, -4.0]]), torch.tensor([[9.0, 0.25]])
    torch.testing.assert_close(smoothing_scale([one, two], torch.tensor([4.0, 1.0]), 0.5), torch.tensor([2 / 3, 0.5]))
    torch.testing.assert_close(smoothing_scale([one], torch.tensor([4.0, 3.0]), 1.0), torch.tensor([4.0, 3.0]))


def test_half_way_inputs_and_weights_have_the_same_extremes() -> None:
    inputs, weight = data(1)
    scale = smoothing_scale([weight], inputs.abs().amax(0), 0.5)
    torch.testing.assert_close((inputs / scale).abs().amax(0), (weight * scale).abs().amax(0))


def test_channels_that_nothing_reaches_keep_their_scale() -> None:
    _, weight = data(2)
    weight[:, 4] = 0
    absmax = torch.ones(64)
    absmax[9] = 0
    scale = smoothing_scale([weight], absmax, 0.5)
    assert float(scale[4]) == float(scale[9]) == 1.0
    assert bool(torch.isfinite(scale).all())


def test_smoothing_pays_once_activations_are_rounded() -> None:
    wanted = scheme("w8a8")
    inputs, weight = data(3)
    statistics = accumulate(None, inputs)
    method = SmoothQuant()

    def error(scale: Tensor) -> float:
        tensor = method.quantize(weight * scale, statistics.scaled_inputs(scale), wanted, EXPERT, torch.bfloat16, {})
        return float((per_token(inputs / scale) @ tensor.dequantize().T - inputs @ weight.T).square().sum())

    scale = method.smooth([weight], statistics, wanted, EXPERT, lambda wished: wished, {})
    assert error(scale) < 0.2 * error(torch.ones(64))


def test_four_bit_weights_get_searched_grids_per_group() -> None:
    (inputs, weight), wanted = data(5), scheme("w4a8", 32)
    statistics = accumulate(None, inputs)
    tensor = SmoothQuant().quantize(weight, statistics, wanted, EXPERT, torch.bfloat16, {})
    assert tensor.scale.shape == (32, 2)
    assert torch.equal(tensor.scale, searched_grid(weight, wanted, torch.bfloat16, statistics.importance)[0])


def test_schemes_and_statistics() -> None:
    method = SmoothQuant()
    assert "w8a8 or w4a8" in method.supports(scheme("w4a16"))
    assert "imatrix" in method.supports(scheme("q8_0"))
    assert method.supports(scheme("w4a8")) == ""
    with pytest.raises(NumericalError, match="needs calibration statistics"):
        method.quantize(data(4)[1], None, scheme("w8a8"), EXPERT, torch.bfloat16, {})
