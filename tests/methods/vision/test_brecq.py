"""brecq: roundings are learned, and every block comes closer to its original than rounding to nearest brings it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_classifier import Setting, divergence, job
from torch import nn

from moqe.errors import UnsupportedLayer
from moqe.methods.vision import brecq
from moqe.methods.vision.brecq import Brecq
from moqe.methods.vision.fisher import fisher_weights
from moqe.methods.vision.learned_rounding import LearnedRounding, inverse_rectified_sigmoid, rectified_sigmoid
from moqe.methods.vision.method import VisionResult
from moqe.methods.vision.network import quantize_network
from moqe.methods.vision.ptq import ptq_layers
from moqe.methods.vision.walk import inputs_of, outputs_of
from moqe.schemes import vision_scheme

W4A4 = vision_scheme("w4a4")


def fit(setting: Setting, name: str = "w4a4", **options: object) -> VisionResult:
    return Brecq().fit(job(setting, "brecq", name, **options))


@pytest.fixture(scope="module")
def learned(setting: Setting) -> VisionResult:
    return fit(setting, steps=40)


def test_every_block_is_closer_than_with_nearest_rounding(setting: Setting, learned: VisionResult) -> None:
    assert set(setting.blocks) == {"stem", "plain", "depthwise", "widen", "linear"}
    for name, note in learned.notes.items():
        assert note["block_error"] < note["block_error_nearest"], name
    assert learned.notes["plain.conv1"]["block_error"] < 0.8 * learned.notes["plain.conv1"]["block_error_nearest"]


def test_the_network_is_closer_on_other_images(setting: Setting, learned: VisionResult) -> None:
    plain = ptq_layers(job(setting, "ptq", "w4a4"))
    before, after = (
        divergence(setting.network, quantize_network(setting.network, layers), setting.held_out)
        for layers in (plain, learned.layers)
    )
    assert after < 0.8 * before


def test_weights_are_rounded_down_or_up_and_nothing_else(setting: Setting, learned: VisionResult) -> None:
    modules = dict(setting.network.named_modules())
    assert [layer.name for layer in learned.layers] == [site.name for site in setting.sites]
    changed = 0
    for layer in learned.layers:
        weight, bias = modules[layer.name].weight, modules[layer.name].bias
        exact = weight / layer.weight.scale.view(-1, *[1] * (weight.ndim - 1))
        low, high = -(1 << (layer.weight.bits - 1)), (1 << (layer.weight.bits - 1)) - 1
        codes = layer.weight.codes.float()
        assert torch.all((codes == exact.floor().clamp(low, high)) | (codes == exact.ceil().clamp(low, high)))
        changed += int((codes != exact.round().clamp(low, high)).sum())
        assert torch.equal(layer.bias, bias)
    assert changed > 0


def test_the_reported_error_is_that_of_the_stored_layers(setting: Setting, learned: VisionResult) -> None:
    quantized = quantize_network(setting.network, learned.layers)
    weights = fisher_weights(setting.network, setting.blocks, setting.images, seed=0)
    for block in setting.blocks:
        made, truth = (
            outputs_of(each.get_submodule(block), inputs_of(each, block, setting.images))
            for each in (quantized, setting.network)
        )
        error = float(((made - truth).square() * weights[block]).mean())
        note = next(note for name, note in learned.notes.items() if name.startswith(block))
        assert note["block_error"] == pytest.approx(error, rel=0.02)


def test_repeatable_and_without_global_state(setting: Setting) -> None:
    state = torch.get_rng_state()
    first, second = (fit(setting, steps=5) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert first.notes == second.notes
    for one, two in zip(first.layers, second.layers, strict=True):
        assert torch.equal(one.weight.codes, two.weight.codes)


def test_carrying_outputs_to_the_next_block_changes_nothing(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[str] = []
    original = brecq.inputs_of
    monkeypatch.setattr(brecq, "inputs_of", lambda net, name, images: runs.append(name) or original(net, name, images))
    carried = fit(setting, steps=8)
    assert runs == ["stem", "stem", "plain", "plain", "linear", "linear"]  # in both networks, where no block precedes
    monkeypatch.setattr(brecq, "followers", lambda *_: frozenset())
    again = fit(setting, steps=8)
    assert len(runs) == 6 + 2 * len(setting.blocks)
    assert carried.notes == again.notes
    for one, two in zip(carried.layers, again.layers, strict=True):
        assert torch.equal(one.weight.codes, two.weight.codes)
        assert one.input == two.input


def test_layers_outside_of_blocks_are_refused(setting: Setting) -> None:
    with pytest.raises(UnsupportedLayer, match="exactly one block"):
        fit(replace(setting, blocks=setting.blocks[1:]), steps=1)


def test_int8_quantizes_outputs_that_are_added(setting: Setting) -> None:
    layers = fit(setting, "w8a8", steps=1).layers
    assert {layer.name for layer in layers if layer.output} == {s.name for s in setting.sites if s.needs_output}


@given(st.floats(0.0, 1.0))
@settings(max_examples=30, deadline=None)
def test_rectified_sigmoid_inverts(h: float) -> None:
    value = torch.tensor(h)
    torch.testing.assert_close(rectified_sigmoid(inverse_rectified_sigmoid(value)), value, rtol=0, atol=1e-6)


def test_a_rounding_starts_soft_and_ends_hard() -> None:
    weight = torch.tensor([[0.3, -0.7, 5.2], [1.0, 0.45, -9.0]])
    rounding = LearnedRounding(weight, torch.tensor([1.0, 0.5]), -8, 7)
    soft = rounding(weight)
    torch.testing.assert_close(soft, torch.tensor([[0.3, -0.7, 5.2], [1.0, 0.45, -4.0]]))
    rounding.hard = True
    assert rounding(weight).tolist() == [[0.0, -1.0, 5.0], [1.0, 0.5, -4.0]]
    with torch.no_grad():
        rounding.v[0] = torch.tensor([0.1, -0.1, 3.0])
    assert rounding(weight)[0].tolist() == [1.0, -1.0, 6.0]


def test_the_regularizer_is_zero_where_roundings_have_settled() -> None:
    rounding = LearnedRounding(torch.tensor([[0.5, 0.25]]), torch.ones(1), -8, 7)
    # h = 1/2 and 1/4: 1 - 0^b and 1 - (1/2)^b
    assert float(rounding.regularizer(2.0).detach()) == pytest.approx(1.75)
    assert float(rounding.regularizer(4.0).detach()) == pytest.approx(1.9375)
    assert rounding.settled() == 0.0
    with torch.no_grad():
        rounding.v.copy_(torch.tensor([[9.0, -9.0]]))
    assert float(rounding.regularizer(2.0).detach()) == 0.0
    assert rounding.settled() == 1.0


def test_fisher_weights_are_mean_squared_gradients(setting: Setting) -> None:
    images = setting.images
    found = fisher_weights(setting.network, ["linear", "widen"], images, seed=4)
    logits = setting.network(images.pixels)
    chances = logits.softmax(-1)
    generator = torch.Generator().manual_seed(4)
    drawn = torch.cat([torch.multinomial(part, 1, generator=generator)[:, 0] for part in chances.split(64)])
    gradient = chances - nn.functional.one_hot(drawn, chances.shape[1])  # of -log p(drawn) by the logits
    expected = gradient.square().mean(0)
    torch.testing.assert_close(found["linear"], expected / expected.mean())
    assert found["widen"].shape == (16, 4, 4)
    assert float(found["widen"].mean()) == pytest.approx(1.0)
