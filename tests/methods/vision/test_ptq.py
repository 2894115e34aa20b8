"""ptq: the baseline is a good one, and its layers are what the schemes and papers say."""

from __future__ import annotations

import torch
from small_classifier import Setting, divergence, job

from moqe.methods.vision.layer import Uniform
from moqe.methods.vision.method import VisionResult
from moqe.methods.vision.network import quantize_network
from moqe.methods.vision.ptq import Ptq


def fit(setting: Setting, name: str, **options: object) -> VisionResult:
    return Ptq().fit(job(setting, "ptq", name, **options))


def test_fewer_bits_are_worse_and_eight_are_nearly_exact(setting: Setting) -> None:
    lost = {
        name: divergence(
            setting.network, quantize_network(setting.network, fit(setting, name).layers), setting.held_out
        )
        for name in ("w8a8", "w4a8", "w4a4")
    }
    assert lost["w8a8"] < 0.002
    assert lost["w8a8"] < lost["w4a8"] < lost["w4a4"]


def test_layers_of_four_bits_keep_eight_at_both_ends(setting: Setting) -> None:
    layers = fit(setting, "w4a4").layers
    assert [layer.name for layer in layers] == [site.name for site in setting.sites]
    bits = [(layer.weight.bits, layer.input.bits) for layer in layers if layer.input]
    assert bits == [(8, 8), *[(4, 4)] * (len(layers) - 2), (8, 8)]
    for layer, site in zip(layers, setting.sites, strict=True):
        assert isinstance(layer.input, Uniform)
        assert not layer.input.signed
        assert (layer.input.zero_point == 0) == site.input_nonnegative
        assert layer.weight.scale.shape == site.weight_shape[:1]
        assert layer.weight.codes.dtype == torch.int8
        assert layer.output is None


def test_int8_quantizes_outputs_that_are_added(setting: Setting) -> None:
    wanted = {site.name for site in setting.sites if site.needs_output}
    assert {"plain.conv2", "depthwise.conv2"} <= wanted
    layers = fit(setting, "w8a8").layers
    assert {layer.name for layer in layers if layer.output} == wanted
    assert all(layer.output.bits == 8 for layer in layers if layer.output)


def test_notes_compare_ptq_with_itself(setting: Setting) -> None:
    notes = fit(setting, "w4a4").notes
    assert list(notes) == [site.name for site in setting.sites]
    assert all(note["error"] == note["ptq_error"] > 0 for note in notes.values())


def test_a_percentile_changes_the_range(setting: Setting) -> None:
    plain, cut = (fit(setting, "w8a8", **options).layers[2].input for options in ({}, {"percentile": 90.0}))
    assert isinstance(plain, Uniform)
    assert isinstance(cut, Uniform)
    assert cut.scale < plain.scale
