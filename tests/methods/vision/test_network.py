"""The reference network computes what its layers say, and nothing else changes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small_classifier import Setting, Small
from torch.nn import functional

from moqe.errors import ModelError
from moqe.methods.vision.layer import QuantizedLayer, Uniform, WeightCodes
from moqe.methods.vision.network import quantize_network


def stem_layer(setting: Setting) -> QuantizedLayer:
    codes = torch.arange(8 * 27).view(8, 3, 3, 3).remainder(15).sub(7).to(torch.int8)
    weight = WeightCodes(codes, torch.linspace(0.01, 0.08, 8), 0, 4)
    return QuantizedLayer("stem", weight, torch.arange(8.0), Uniform(0.25, 8, 4), Uniform(0.5, 3, 8))


def test_a_layer_quantizes_input_weight_and_output(setting: Setting) -> None:
    layer = stem_layer(setting)
    quantized = quantize_network(setting.network, [layer])
    x = setting.images.pixels[:4]
    assert layer.input is not None
    assert layer.output is not None
    made = layer.output(functional.conv2d(layer.input(x), layer.weight.dequantize(), torch.arange(8.0), padding=1))
    assert torch.equal(quantized.get_submodule("stem")(x), made)
    rest = setting.network
    expected = rest.linear(functional.relu(rest.widen(rest.depthwise(rest.plain(functional.relu(made))))).mean((2, 3)))
    assert torch.equal(quantized(x), expected)


def test_the_network_stays_as_it_was(setting: Setting) -> None:
    network, pixels = Small(), setting.images.pixels[:2]
    before = network(pixels).detach()
    quantize_network(network, [stem_layer(setting)])
    assert torch.equal(network(pixels), before)
    assert torch.equal(quantize_network(network, [])(pixels), before)


def test_layers_of_another_network_are_refused(setting: Setting) -> None:
    layer = stem_layer(setting)
    with pytest.raises(ModelError, match="no convolution or linear named 'head'"):
        quantize_network(setting.network, [replace(layer, name="head")])
    with pytest.raises(ModelError, match=r"widen: the weight has shape \(16, 8, 1, 1\)"):
        quantize_network(setting.network, [replace(layer, name="widen")])
