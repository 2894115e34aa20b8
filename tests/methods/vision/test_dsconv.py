"""dsconv: shifts are least squares, representable kernels come back exactly, activations are block floating point."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_classifier import Setting, divergence, job

from moqe.errors import UnsupportedLayer
from moqe.methods.vision.dsconv import DsConv, block_codes, distribution_shift
from moqe.methods.vision.layer import BlockFloat
from moqe.methods.vision.method import VisionResult
from moqe.methods.vision.network import quantize_network
from moqe.methods.vision.ptq import round_weight
from moqe.schemes import vision_scheme

W4A4 = vision_scheme("w4a4")


def test_shifts_are_the_least_squares_of_a_hand_computed_case() -> None:
    weight = torch.tensor([[0.9, -2.1, 0.1], [0.0, 0.0, 0.0]])
    codes = torch.tensor([[1, -2, 0], [0, 0, 0]], dtype=torch.int8)
    assert distribution_shift(weight, codes).tolist() == [pytest.approx((0.9 + 4.2) / 5), 1.0]


@given(st.integers(0, 1000), st.floats(0.9, 1.1))
@settings(max_examples=25, deadline=None)
def test_no_other_shift_is_better(seed: int, factor: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(6, 8, generator=generator)
    codes = torch.randint(-8, 8, (6, 8), generator=generator)
    shift = distribution_shift(weight, codes)[:, None]
    error = (weight - codes * shift).square().sum(-1)
    assert torch.all(error <= (weight - codes * shift * factor).square().sum(-1) + 1e-5)


@given(st.integers(0, 1000), st.integers(1, 6), st.integers(2, 11), st.integers(2, 5))
@settings(max_examples=25, deadline=None)
def test_a_kernel_of_integers_and_shifts_comes_back(seed: int, out: int, depth: int, block: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-8, 8, (out, depth, 2, 3), generator=generator).float()
    block = min(block, depth)
    first = codes[:, ::block]  # one extreme in every block, so that the scale is the only one that fits
    first.copy_(torch.where(first < 0, -8.0, 7.0))
    shift = 2.0 ** torch.randint(-6, 3, (out, -(-depth // block), 2, 3), generator=generator)
    weight = codes * shift.repeat_interleave(block, 1)[:, :depth]
    made = block_codes(weight, W4A4, block)
    assert made.scale.shape == shift.shape
    assert torch.equal(made.dequantize(), weight)


def test_blocks_are_more_exact_than_channels_and_smaller_blocks_more_so() -> None:
    weight = torch.randn(8, 32, 3, 3, generator=torch.Generator().manual_seed(0))
    weight *= torch.linspace(0.2, 3, 32).view(1, -1, 1, 1)
    errors = [
        float((codes.dequantize() - weight).square().mean())
        for codes in (round_weight(weight, W4A4), block_codes(weight, W4A4, 32), block_codes(weight, W4A4, 8))
    ]
    assert errors[0] > errors[1] > errors[2]


def test_a_depth_of_one_has_shifts_per_output_channel() -> None:
    weight = torch.randn(6, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    made = block_codes(weight, W4A4, 64)
    assert (made.block, made.scale.shape) == (0, (6,))
    assert block_codes(weight.expand(6, 5, 3, 3).contiguous(), W4A4, 64).block == 5


def fit(setting: Setting, name: str = "w4a4", **options: object) -> VisionResult:
    return DsConv().fit(job(setting, "dsconv", name, **options))


def test_all_convolutions_and_no_linear(setting: Setting) -> None:
    layers = fit(setting, steps=0, block=4).layers
    assert [layer.name for layer in layers] == [site.name for site in setting.sites if site.kind == "conv"]
    for layer, site in zip(layers, setting.sites, strict=False):
        assert layer.input == BlockFloat(4, 4, signed=not site.input_nonnegative, axis=1)
        assert layer.weight.bits == 4
        assert layer.output is None
    assert {layer.name for layer in layers if layer.weight.block == 0} == {"depthwise.conv1"}


def test_a_network_without_convolutions_is_refused(setting: Setting) -> None:
    linear = tuple(site for site in setting.sites if site.kind == "linear")
    with pytest.raises(UnsupportedLayer, match="the network has none"):
        fit(replace(setting, sites=linear))


def test_adaptation_brings_the_network_closer_on_other_images(setting: Setting) -> None:
    state = torch.get_rng_state()
    plain, adapted = fit(setting, steps=0), fit(setting, steps=40)
    assert torch.equal(torch.get_rng_state(), state)
    before, after = (
        divergence(setting.network, quantize_network(setting.network, result.layers), setting.held_out)
        for result in (plain, adapted)
    )
    assert after < 0.8 * before
    assert all("final_loss" in note for note in adapted.notes.values())
    assert not any("final_loss" in note for note in plain.notes.values())


def test_eight_bits_are_nearly_exact(setting: Setting) -> None:
    layers = fit(setting, "w8a8", steps=0).layers
    assert divergence(setting.network, quantize_network(setting.network, layers), setting.held_out) < 1e-4
