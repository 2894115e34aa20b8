"""Scales alone: codes stay, training helps, and images that are listed oftener are seen oftener."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_classifier import Setting, divergence, job

from moqe.methods.vision.layer import QuantizedLayer
from moqe.methods.vision.network import quantize_network
from moqe.methods.vision.ptq import ptq_layers
from moqe.methods.vision.rescale import FixedCodes, rescale, scale_options
from moqe.methods.vision.weighted import RepeatedImages, weighted_rows


@pytest.mark.parametrize(("method", "steps"), [("qat", 60), ("brecq", 60)])
def test_scales_alone_bring_the_network_closer(setting: Setting, method: str, steps: int) -> None:
    asked = job(setting, method, "w4a4", steps=steps, batch_size=32)
    start = ptq_layers(asked)
    found = rescale(asked, start)
    before, after = (
        divergence(setting.network, quantize_network(setting.network, layers), setting.held_out)
        for layers in (start, found.layers)
    )
    assert after < 0.9 * before
    for old, new in zip(start, found.layers, strict=True):
        assert torch.equal(old.weight.codes, new.weight.codes)
        assert not torch.equal(old.weight.scale, new.weight.scale)
        assert bool((new.weight.scale > 0).all())
    assert any(old.bias is not None and not torch.equal(old.bias, new.bias) for old, new in pairs(start, found.layers))
    assert all(note["scale_steps"] == steps for note in found.notes.values())


def pairs(start: tuple[QuantizedLayer, ...], end: tuple[QuantizedLayer, ...]) -> list[tuple[QuantizedLayer, ...]]:
    """Layers side by side."""
    return list(zip(start, end, strict=True))


def test_training_begins_with_the_biases_of_the_codes(setting: Setting) -> None:
    asked = job(setting, "qat", "w4a4", steps=1, batch_size=8, learning_rate=1e-12)
    start = tuple(replace(layer, bias=None if layer.bias is None else layer.bias + 1.0) for layer in ptq_layers(asked))
    for old, new in pairs(start, rescale(asked, start).layers):
        assert old.bias is None or torch.allclose(old.bias, new.bias, atol=1e-6)


def test_a_rounded_weight_is_code_times_scale() -> None:
    codes, scale = torch.randint(-8, 8, (5, 3, 2, 2)), torch.rand(5) + 0.1
    fixed = FixedCodes(codes, scale)
    weight = fixed(torch.zeros(5, 3, 2, 2))
    assert torch.equal(weight, codes * scale.view(5, 1, 1, 1))
    weight.sum().backward()
    assert fixed.step.grad is not None
    assert torch.allclose(fixed.step.grad, codes.sum((1, 2, 3)).float())
    with torch.no_grad():
        fixed.step.sub_(10.0)
    fixed.keep_positive()
    assert bool((fixed.step > 0).all())


def test_the_number_of_updates_is_the_method_s(setting: Setting) -> None:
    expert = job(setting, "brecq", "w4a4", steps=7, batch_size=5).expert
    assert (scale_options(expert).steps, scale_options(expert).batch_size) == (7, 5)


@given(
    own=st.lists(st.booleans(), min_size=1, max_size=60),
    weight=st.floats(1.0, 16.0, allow_nan=False),
    seed=st.integers(0, 5),
)
def test_own_rows_stand_so_often(own: list[bool], weight: float, seed: int) -> None:
    mask = torch.tensor(own)
    rows = weighted_rows(mask, weight, seed)
    counts = torch.bincount(rows, minlength=len(own))
    assert bool((counts[~mask] == 1).all())
    assert bool(((counts[mask] == int(weight)) | (counts[mask] == int(weight) + 1)).all())
    assert abs(int(counts[mask].sum()) - weight * int(mask.sum())) <= 0.5
    assert torch.equal(rows, weighted_rows(mask, weight, seed))


def test_a_list_of_images_is_what_it_lists(setting: Setting) -> None:
    rows = torch.tensor([3, 3, 0, 7])
    found = RepeatedImages(setting.images, rows)
    assert len(found) == 4
    assert torch.equal(found.labels, setting.images.labels[rows])
    assert torch.equal(found.batch(torch.tensor([1, 2])), setting.images.pixels[[3, 0]])
