"""Quantized layers: every number as the definitions say."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moqe.methods.vision.layer import BlockFloat, Thresholds, Uniform, WeightCodes, float32, signed_range

SEEDS = st.integers(0, 10_000)


def random(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


@given(SEEDS, st.integers(1, 4), st.integers(1, 9), st.integers(0, 4), st.booleans())
@settings(max_examples=30, deadline=None)
def test_weights_decode_to_codes_times_their_scale(seed: int, out: int, depth: int, block: int, linear: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = (out, depth) if linear else (out, depth, 2, 3)
    codes = torch.randint(-8, 8, shape, generator=generator).to(torch.int8)
    size = (out, -(-depth // block), *shape[2:]) if block else (out,)
    scale = torch.rand(size, generator=generator) + 0.1
    weight = WeightCodes(codes, scale, block, 4).dequantize()
    assert weight.dtype == torch.float32
    for index in torch.cartesian_prod(*[torch.arange(n) for n in shape]).tolist():
        row, channel, *position = index
        step = scale[(row, channel // block, *position)] if block else scale[row]
        assert weight[tuple(index)] == codes[tuple(index)] * step


@pytest.mark.parametrize(("signed", "zero_point"), [(False, 0), (False, 9), (True, 0), (True, -3)])
def test_uniform_levels(signed: bool, zero_point: int) -> None:
    quantizer = Uniform(float32(0.3), zero_point, 4, signed)
    x = random(0, 500, scale=3)
    low, high = (-8, 7) if signed else (0, 15)
    expected = [
        (min(max(round(value / quantizer.scale) + zero_point, low), high) - zero_point) * quantizer.scale
        for value in x.tolist()
    ]
    torch.testing.assert_close(quantizer(x), torch.tensor(expected))
    assert torch.equal(quantizer(quantizer(x)), quantizer(x))
    assert float(quantizer(torch.zeros(()))) == 0.0


def test_uniform_rounds_halves_to_even_and_leaves_its_input_alone() -> None:
    x = torch.tensor([0.25, 0.75, 1.25, 1.75])
    assert Uniform(0.5, 0, 8)(x).tolist() == [0.0, 1.0, 1.0, 2.0]
    assert x.tolist() == [0.25, 0.75, 1.25, 1.75]


def test_thresholds_look_their_level_up() -> None:
    table = torch.zeros(1 << 16, dtype=torch.uint8)
    table[110:] = 1  # from x = 0.1
    table[150:] = 3  # from x = 0.5
    quantizer = Thresholds(table, fine_scale=float32(0.01), fine_zero_point=100, scale=2.0, bits=2, zero_point=1)
    x = torch.tensor([-50.0, 0.0, 0.08, 0.1, 0.4, 0.51, 9e9])
    assert quantizer(x).tolist() == [-2.0, -2.0, -2.0, 0.0, 0.0, 4.0, 4.0]


@given(SEEDS, st.integers(2, 8), st.integers(1, 7), st.booleans(), st.integers(-40, 40))
@settings(max_examples=40, deadline=None)
def test_block_float_is_nearest_on_the_grid_of_the_largest(
    seed: int, bits: int, block: int, signed: bool, exponent: int
) -> None:
    x = random(seed, 2, 5, 2, 2, scale=2.0**exponent)
    x = x if signed else x.abs()
    result = BlockFloat(bits, block, signed, axis=1)(x)
    magnitude = bits - 1 if signed else bits
    for part, made in zip(x.split(block, 1), result.split(block, 1), strict=True):
        largest = part.abs().amax(1, keepdim=True)
        step = torch.tensor([2.0 ** (math.floor(math.log2(v)) + 1 - magnitude) for v in largest.flatten().tolist()])
        codes = made / step.view(largest.shape)
        assert torch.equal(codes, codes.round())
        low, high = signed_range(bits) if signed else (0, (1 << bits) - 1)
        assert codes.min() >= low
        assert codes.max() <= high
        nearest = (part / step.view(largest.shape)).round().clamp(low, high)
        assert torch.equal(codes, nearest)
    if not signed:  # a negative extreme may round up to the next power of two
        assert torch.equal(BlockFloat(bits, block, signed, axis=1)(result), result)


def test_block_float_at_powers_of_two_zeros_and_along_the_last_axis() -> None:
    quantizer = BlockFloat(4, 2, signed=False, axis=-1)  # step is 2 ** e / 8
    x = torch.tensor([[1.0, 0.06, 0.999, 0.06, 0.0, 0.0, 4.0]])
    # 1 has the step 1/8 and 0.999 the step 1/16; the last block is one element
    assert quantizer(x).tolist() == [[1.0, 0.0, 0.9375, 0.0625, 0.0, 0.0, 4.0]]
    tiny = torch.tensor([[1e-38, 2e-39]])
    assert quantizer(tiny).tolist() == [[0.0, 0.0]]


def test_float32_is_exact() -> None:
    assert float32(0.1) == torch.tensor(0.1).item() != 0.1
