"""qat: training helps, what was trained is what is stored, and it is repeatable."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from small_classifier import Images, Setting, divergence, job

from moqe.errors import NumericalError
from moqe.methods.vision.layer import QuantizedLayer, Uniform
from moqe.methods.vision.lsq import LearnedStep
from moqe.methods.vision.method import VisionResult
from moqe.methods.vision.network import quantize_network
from moqe.methods.vision.ptq import ptq_layers
from moqe.methods.vision.qat import Qat, learned_activation, learned_input, learned_weight
from moqe.methods.vision.training import attach, shuffled, train, trainable_copy, trained_weight
from moqe.schemes import vision_scheme

W4A4 = vision_scheme("w4a4")


def fit(setting: Setting, name: str = "w4a4", seed: int = 0, **options: object) -> VisionResult:
    chosen = {"steps": 40, "batch_size": 32, **options}
    return Qat().fit(job(setting, "qat", name, seed, **chosen))


def test_training_brings_the_network_closer_on_other_images(setting: Setting) -> None:
    plain = ptq_layers(job(setting, "ptq", "w4a4"))
    trained = fit(setting)
    before, after = (
        divergence(setting.network, quantize_network(setting.network, layers), setting.held_out)
        for layers in (plain, trained.layers)
    )
    assert after < 0.8 * before
    assert all(note["steps"] == 40 for note in trained.notes.values())
    assert any(note["error"] != note["ptq_error"] for note in trained.notes.values())


def test_same_seed_same_layers_and_no_global_state(setting: Setting) -> None:
    state, before = torch.get_rng_state(), deepcopy(setting.network.state_dict())
    first, second, other = (fit(setting, seed=seed, steps=4) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    for name, tensor in setting.network.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert first.notes == second.notes
    for one, two in zip(first.layers, second.layers, strict=True):
        assert torch.equal(one.weight.codes, two.weight.codes)
        assert torch.equal(one.weight.scale, two.weight.scale)
        assert one.input == two.input
    assert any(one.input != two.input for one, two in zip(first.layers, other.layers, strict=True))


def test_a_trained_layer_is_stored_number_for_number(setting: Setting) -> None:
    plain = ptq_layers(job(setting, "ptq", "w4a4"))
    student = trainable_copy(setting.network)
    modules, activations = dict(student.named_modules()), dict[str, LearnedStep]()
    generator = torch.Generator().manual_seed(0)
    for layer in plain:
        assert isinstance(layer.input, Uniform)
        weight, activation = learned_weight(layer), learned_activation(layer.input, 10)
        attach(modules[layer.name], weight, activation)
        for step in (weight.step, activation.step):
            step.data.mul_(1 + 0.2 * torch.rand(step.shape, generator=generator))
        activations[layer.name] = activation
    stored = [
        QuantizedLayer(
            layer.name,
            *trained_weight(modules[layer.name], layer),
            learned_input(activations[layer.name].step, layer.input),
        )
        for layer in plain
        if isinstance(layer.input, Uniform)
    ]
    pixels = setting.images.pixels
    torch.testing.assert_close(
        quantize_network(setting.network, stored)(pixels), student(pixels).detach(), rtol=1e-4, atol=1e-4
    )


def test_first_and_last_have_eight_bits_and_int8_has_outputs(setting: Setting) -> None:
    layers = fit(setting, "w8a8", steps=2).layers
    assert {layer.name for layer in layers if layer.output} == {s.name for s in setting.sites if s.needs_output}
    assert [layer.weight.bits for layer in fit(setting, steps=1).layers] == [8, 4, 4, 4, 4, 4, 8]


def test_labels_are_used_only_on_request(setting: Setting) -> None:
    images = setting.images
    wrong = Setting(
        setting.network, setting.sites, setting.blocks, type(images)(images.pixels, images.labels.flip(0)), images
    )
    for loss, same in (("distill", True), ("labels", False)):
        one, two = (fit(each, steps=3, loss=loss).notes["linear"]["final_loss"] for each in (setting, wrong))
        assert (one == two) == same


def test_a_loss_that_is_not_finite_is_reported(setting: Setting) -> None:
    network = trainable_copy(setting.network)
    weight = network.get_parameter("linear.weight").requires_grad_(True)
    images = Images(setting.images.pixels * torch.nan, setting.images.labels)
    asked = job(replace(setting, images=images), "qat", "w4a4", steps=5, batch_size=8)
    with pytest.raises(NumericalError, match="test: the loss is not finite after 0 steps: lower learning_rate"):
        train(asked, network, [{"params": [weight], "lr": 0.1}], [], asked.expert.qat)


def test_every_row_comes_once_per_round() -> None:
    rows = shuffled(7, 3, torch.Generator().manual_seed(0))
    drawn = torch.cat([next(rows) for _ in range(7)])
    for start in (0, 7, 14):
        assert sorted(drawn[start : start + 7].tolist()) == list(range(7))
