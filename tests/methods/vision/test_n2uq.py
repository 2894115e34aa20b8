"""n2uq: thresholds and their gradient equal a case worked out by hand; what is trained is what is stored."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_classifier import Setting, divergence, job

from moqe.methods.vision.layer import FINE_LEVELS, Thresholds, Uniform, WeightCodes
from moqe.methods.vision.learned_thresholds import LearnedThresholds
from moqe.methods.vision.method import VisionResult
from moqe.methods.vision.n2uq import EntropyWeight, N2uq
from moqe.methods.vision.network import quantize_network
from moqe.methods.vision.ptq import ptq_layers


def three_intervals(start: float = 0.0, zero_point: int = 0) -> LearnedThresholds:
    """Two bits: intervals of 1, 2 and 4 from `start`, so thresholds at 0.5, 2 and 5 behind it; levels 10 apart."""
    quantizer = LearnedThresholds(Uniform(3.0, zero_point, 2))
    with torch.no_grad():
        quantizer.start.fill_(start)
        quantizer.intervals.copy_(torch.tensor([1.0, 2.0, 4.0]))
        quantizer.scale.fill_(10.0)
    return quantizer


def test_thresholds_lie_in_the_middle_of_intervals() -> None:
    x = torch.tensor([[-1.0, 0.0, 0.49, 0.51, 1.99], [2.01, 4.99, 5.01, 7.0, 100.0]])
    quantizer = three_intervals()
    assert quantizer(x).tolist() == [[0.0, 0.0, 0.0, 10.0, 10.0], [20.0, 20.0, 30.0, 30.0, 30.0]]
    assert quantizer.edges().tolist() == [0.0, 1.0, 3.0, 7.0]
    shifted = three_intervals(start=-3.0, zero_point=1)
    assert shifted(x[:, :2]).tolist() == [[10.0, 10.0], [20.0, 20.0]]  # thresholds at -2.5, -1 and 2, level 1 is zero


def test_gradients_equal_the_generalised_straight_through_estimator() -> None:
    # E(x) = x on (0, 1], 1 + (x - 1) / 2 on (1, 3], 2 + (x - 3) / 4 on (3, 7]
    x = torch.tensor([[-0.5, 0.25, 1.5, 4.0, 9.0]], requires_grad=True)
    quantizer = three_intervals()
    incoming = torch.tensor([[1.0, 10.0, 100.0, 1000.0, 1e4]])
    (quantizer(x) / 10.0).backward(incoming)  # by levels: the scale of 10 taken out
    assert x.grad is not None
    assert x.grad.tolist() == [[0.0, 10.0, 50.0, 250.0, 0.0]]
    # dE/da_i = -(x - e) / a_i^2 in its own interval, -1 / a_k in every later one
    first = -0.25 * 10 - 100 / 2 - 1000 / 4
    second = -(0.5 / 4) * 100 - 1000 / 4
    third = -(1 / 16) * 1000
    torch.testing.assert_close(quantizer.intervals.grad, torch.tensor([first, second, third]))
    assert float(quantizer.start.grad) == pytest.approx(-10 - 50 - 250)
    # the levels themselves: 0, 0, 1, 2 and 3, over the 10 taken out
    assert float(quantizer.scale.grad) == pytest.approx((0 + 0 + 100 + 2000 + 3e4) / 10)


@given(st.integers(0, 1000), st.sampled_from([2, 4]))
@settings(max_examples=15, deadline=None)
def test_gradients_are_those_of_the_expected_level(seed: int, bits: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    quantizer = LearnedThresholds(Uniform(0.25, 0, bits))
    with torch.no_grad():
        quantizer.intervals.mul_(0.5 + torch.rand(quantizer.intervals.shape, generator=generator))
    x = torch.rand(3, 40, generator=generator) * 0.25 * 2**bits
    # on the 16-bit grid, a point that lies on an edge within rounding may be counted to either side
    apart = (x[..., None] - quantizer.edges().detach()).abs().amin(-1) > 2 * quantizer.fine_scale
    incoming = torch.randn(x.shape, generator=generator) * apart
    (quantizer(x) / quantizer.scale.detach()).backward(incoming)
    start, intervals = (value.detach().clone().requires_grad_(True) for value in (quantizer.start, quantizer.intervals))
    edges = torch.cat([start[None], start + intervals.cumsum(0)])
    expected = sum(((x - edges[i]) / intervals[i]).clamp(0, 1) for i in range(len(intervals)))
    expected.backward(incoming)
    torch.testing.assert_close(quantizer.intervals.grad, intervals.grad, rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(quantizer.start.grad, start.grad, rtol=1e-3, atol=1e-2)


def test_equal_intervals_are_uniform_levels_and_plain_straight_through() -> None:
    uniform = Uniform(0.5, 3, 4)
    quantizer = LearnedThresholds(uniform)
    x = torch.linspace(-1.4, 5.9, 300)[:, None].requires_grad_(True)
    made = quantizer(x)
    torch.testing.assert_close(made, uniform(x.detach()))
    made.backward(torch.ones_like(made))
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.ones_like(x))


def test_the_stored_table_computes_what_training_did() -> None:
    quantizer = three_intervals(start=-3.0, zero_point=1)
    stored = quantizer.stored()
    assert stored.table.shape == (FINE_LEVELS,)
    assert stored.table.dtype == torch.uint8
    assert stored.table.max() == 3
    assert torch.all(stored.table[1:] >= stored.table[:-1])
    x = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 4
    assert torch.equal(stored(x), quantizer(x).detach())
    channels_last = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(quantizer(channels_last), quantizer(x))


def test_intervals_stay_apart() -> None:
    quantizer = three_intervals()
    with torch.no_grad():
        quantizer.intervals[1] = -5.0
    quantizer.keep_valid()
    assert quantizer.intervals.tolist() == [1.0, pytest.approx(3e-3), 4.0]


def test_entropy_preserving_weights_use_codes_equally_often() -> None:
    weight = torch.rand(2, 40, 10, 10, generator=torch.Generator().manual_seed(0)) * 2 - 1
    quantizer = EntropyWeight(3)
    codes, step = quantizer.codes(weight)
    torch.testing.assert_close(step, weight.abs().mean((1, 2, 3)) / 2)
    counts = torch.bincount(codes.flatten().long() + 4, minlength=8) / codes.numel()
    assert counts[1:].min() > 0.11  # of 1 / 8; the lowest code is half as wide where the range is symmetric
    torch.testing.assert_close(quantizer(weight), codes * step.view(2, 1, 1, 1))
    weight.requires_grad_(True)
    quantizer(weight).backward(torch.full_like(weight, 2.0))
    assert torch.equal(weight.grad, torch.full_like(weight, 2.0))


def fit(setting: Setting, name: str = "w4a4", **options: object) -> VisionResult:
    return N2uq().fit(job(setting, "n2uq", name, **options))


def test_training_brings_the_network_closer_on_other_images(setting: Setting) -> None:
    state = torch.get_rng_state()
    trained = fit(setting, steps=40)
    assert torch.equal(torch.get_rng_state(), state)
    names = [site.name for site in setting.sites]
    assert [layer.name for layer in trained.layers] == names[1:-1]  # both ends stay in full precision
    assert all(isinstance(layer.input, Thresholds) and layer.output is None for layer in trained.layers)
    plain = ptq_layers(job(setting, "ptq", "w4a4"))[1:-1]
    before, after = (
        divergence(setting.network, quantize_network(setting.network, layers), setting.held_out)
        for layers in (plain, trained.layers)
    )
    assert after < 0.8 * before
    stored = trained.layers[0].input
    assert isinstance(stored, Thresholds)
    widths = torch.bincount(stored.table.long())[1:-1]
    assert widths.max() > 1.02 * widths.min()  # thresholds have moved apart


def test_eight_bits_and_the_entropy_grid(setting: Setting) -> None:
    layers = fit(setting, "w8a8", steps=2).layers
    assert {(layer.weight.bits, layer.input.bits) for layer in layers if layer.input} == {(8, 8)}
    assert divergence(setting.network, quantize_network(setting.network, layers), setting.held_out) < 1e-3
    entropy = fit(setting, weights="entropy", steps=1).layers[1].weight
    assert isinstance(entropy, WeightCodes)
    weight = setting.network.get_parameter("plain.conv2.weight")
    torch.testing.assert_close(entropy.scale, weight.abs().mean((1, 2, 3)) / 4, rtol=0.05, atol=0)
