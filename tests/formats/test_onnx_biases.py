"""Biases as integer kernels hold them: multiples of a step, within 32 bits, next to what they were."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moqe.formats.onnx_biases import bias_steps, integer_biases
from moqe.methods.vision.layer import BlockFloat, QuantizedLayer, Uniform, WeightCodes, float32


def layer(seed: int, bits: int, exponent: float, input_scale: float) -> QuantizedLayer:
    random = torch.Generator().manual_seed(seed)
    half = 1 << (bits - 1)
    codes = torch.randint(-half, half, (6, 3, 3, 3), generator=random).to(torch.int8)
    scale = 10.0 ** (exponent * torch.rand(6, generator=random))
    weight = WeightCodes(codes, scale, 0, bits)
    return QuantizedLayer("layer", weight, torch.randn(6, generator=random), Uniform(float32(input_scale), 0, 8))


@settings(deadline=None)
@given(seed=st.integers(0, 999), bits=st.integers(2, 8), exponent=st.floats(-30, 0), scale=st.floats(1e-3, 10))
def test_biases_are_held_and_hardly_moved(seed: int, bits: int, exponent: float, scale: float) -> None:
    before = layer(seed, bits, exponent, scale)
    (after,) = integer_biases([before])
    steps = bias_steps(after)
    assert before.bias is not None
    assert after.bias is not None
    assert steps is not None
    counts = after.bias.double() / steps.double()
    assert float(counts.abs().max()) < 2**30
    torch.testing.assert_close(counts, counts.round(), rtol=1e-6, atol=0)
    torch.testing.assert_close(steps, after.weight.scale * scale / 2 ** (8 - bits))  # few bits do not make it coarse
    assert bool(((after.bias - before.bias).abs() <= 0.501 * steps + 1e-6 * before.bias.abs()).all())
    moved = (after.weight.dequantize() - before.weight.dequantize()).abs().flatten(1).amax(1)
    assert bool((moved * scale <= before.bias.abs() * 2.0**-23).all())


def test_only_what_does_not_fit_changes_its_codes() -> None:
    before = layer(0, 8, -3, 0.1)
    (after,) = integer_biases([before])
    assert after.weight is before.weight
    (again,) = integer_biases([after])
    assert torch.equal(again.bias, after.bias)  # type: ignore[arg-type]


def test_layers_in_float_stay() -> None:
    whole = layer(0, 8, -3, 0.1)
    without_bias = QuantizedLayer("layer", whole.weight, None, whole.input)
    weights_only = QuantizedLayer("layer", whole.weight, whole.bias, None)
    block_float = QuantizedLayer("layer", whole.weight, whole.bias, BlockFloat(8, 4, True, 1))
    kept = (without_bias, weights_only, block_float)
    assert all(after is before for after, before in zip(integer_biases(kept), kept, strict=True))
