"""Ranges of activations from what calibration images put through."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_classifier import Images, Setting, job
from torch import Tensor

from moqe.errors import NumericalError
from moqe.methods.vision.layer import Uniform
from moqe.methods.vision.network import quantize_network
from moqe.methods.vision.observe import Observed, observe, uniform_for, with_outputs
from moqe.methods.vision.ptq import ptq_layers


def observed(values: Tensor) -> Observed:
    return Observed(float(values.min()), float(values.max()), values)


def test_samples_are_seeded_and_of_their_own(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moqe.methods.vision.observe.SAMPLE", 1000)
    state = torch.get_rng_state()
    together, _ = observe(setting.network, ["stem", "widen"], [], setting.images, seed=3)
    alone, _ = observe(setting.network, ["widen"], [], setting.images, seed=3)
    other, _ = observe(setting.network, ["widen"], [], setting.images, seed=4)
    assert torch.equal(torch.get_rng_state(), state)
    assert 1000 <= len(alone["widen"].sample) < 1500
    assert torch.equal(together["widen"].sample, alone["widen"].sample)
    assert not torch.equal(other["widen"].sample, alone["widen"].sample)


def test_observation_sees_inputs_and_outputs(setting: Setting) -> None:
    state = torch.get_rng_state()
    inputs, outputs = observe(setting.network, ["stem", "widen"], ["stem"], setting.images, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    pixels = setting.images.pixels
    assert (inputs["stem"].lowest, inputs["stem"].highest) == (float(pixels.min()), float(pixels.max()))
    assert inputs["widen"].lowest == 0.0
    made = setting.network.get_submodule("stem")(pixels)
    assert outputs["stem"].highest == pytest.approx(float(made.max()))
    assert set(inputs["stem"].sample.tolist()) <= set(pixels.flatten().tolist())
    again, _ = observe(setting.network, ["stem"], [], setting.images, seed=3)
    assert torch.equal(again["stem"].sample, inputs["stem"].sample)


def test_activations_that_are_not_finite_are_named(setting: Setting) -> None:
    broken = Images(setting.images.pixels.clone(), setting.images.labels)
    broken.pixels[5, 0, 0, 0] = torch.nan
    with pytest.raises(NumericalError, match="stem: activations are not finite"):
        observe(setting.network, ["stem"], [], broken, seed=0)
    with pytest.raises(NumericalError, match="calibration has no images"):
        observe(setting.network, ["stem"], [], Images(broken.pixels[:0], broken.labels[:0]), seed=0)


@given(st.integers(0, 1000), st.sampled_from([2, 4, 8]), st.booleans())
@settings(max_examples=25, deadline=None)
def test_the_search_beats_the_whole_range(seed: int, bits: int, nonnegative: bool) -> None:
    values = torch.randn(3000, generator=torch.Generator().manual_seed(seed)) ** 3
    values = values.abs() if nonnegative else values
    found = uniform_for(observed(values), bits)
    whole = uniform_for(observed(values), bits, percentile=100.0)
    assert (found.zero_point == 0) == nonnegative
    assert float((found(values) - values).square().mean()) <= float((whole(values) - values).square().mean()) + 1e-9
    low, high = whole.levels
    reach = whole.scale * (high - low)
    assert reach == pytest.approx(float(values.max() - min(0.0, float(values.min()))), rel=1e-5)


def test_a_percentile_cuts_the_ends() -> None:
    values = torch.arange(1001.0)
    assert uniform_for(observed(values), 8, percentile=90.0).scale == pytest.approx(900 / 255)
    both = uniform_for(observed(values - 400), 8, percentile=90.0)
    assert both.scale == pytest.approx(900 / 255)
    assert both.zero_point == 99  # 350 / (900 / 255) = 99.2


def test_a_tensor_of_zeros_has_a_scale() -> None:
    assert uniform_for(observed(torch.zeros(10)), 4) == Uniform(1.0, 0, 4)


def test_outputs_are_fitted_to_the_quantized_network(setting: Setting) -> None:
    layers = ptq_layers(job(setting, "ptq", "w4a4"))
    assert with_outputs(setting.network, layers, (), setting.images, 0) == layers
    made = with_outputs(setting.network, layers, ("plain.conv2",), setting.images, 0)
    assert [layer.name for layer in made] == [layer.name for layer in layers]
    found = {layer.name: layer.output for layer in made if layer.output}
    _, quantized = observe(quantize_network(setting.network, layers), [], ["plain.conv2"], setting.images, 0)
    assert found == {"plain.conv2": uniform_for(quantized["plain.conv2"], 8)}
