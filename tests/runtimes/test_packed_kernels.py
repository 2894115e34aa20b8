"""Packed weights stand for the same matrix, and each way to multiply by them is as accurate as it says."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moqe.formats.ggml_blocks import BLOCK_SCHEMES, dequantize, unpack
from moqe.models.activations import quantize_activations
from moqe.quantized import BlockTensor, IntegerTensor
from moqe.runtimes.packed.bag_kernels import BagKernels, bag_table
from moqe.runtimes.packed.byte_kernels import ByteKernels
from moqe.runtimes.packed.float_kernels import FloatKernels
from moqe.runtimes.packed.kernel import Choice, Multiply
from moqe.runtimes.packed.linear import PackedCodes, PackedLinear, pack_kernels
from moqe.runtimes.packed.tile_kernels import TileKernels, fits_tiles, tile_outputs
from moqe.runtimes.packed.weight import GroupedWeight, concatenated, grouped_weight
from moqe.schemes import Scheme, scheme
from split_experts import random_codes

SCHEMES = {
    "symmetric": scheme("w4a16", group_size=64),
    "asymmetric": scheme("w4a16", group_size=32, symmetric=False),
    "small groups": Scheme("w4a16", 4, symmetric=False, group_size=16),
    "whole rows": scheme("w4a16", group_size=0),
    "3 bits": scheme("w3a16"),
    "2 bits": scheme("w2a16"),
    "8 bits": scheme("w8a16"),
    "8 bits, asymmetric": scheme("w8a16", symmetric=False),
    "8 bits, grouped": scheme("w8a16", group_size=32),
}
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}
TILES = pytest.mark.skipif(tile_outputs() == 0, reason="this processor packs 4-bit codes in another way")


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def random_blocks(block: str, rows: int = 64, columns: int = 512) -> BlockTensor:
    """Random bytes, with scales of a size that float16 has."""
    target = BLOCK_SCHEMES[block]
    raw = torch.randint(0, 256, (rows, columns // target.block_size * target.block_bytes), dtype=torch.uint8)
    tensor = unpack(raw, target)
    halves = {name: torch.rand(part.shape).half() for name, part in tensor.fields.items() if part.dtype == torch.half}
    return BlockTensor(tensor.codes, {**tensor.fields, **halves}, scheme=target)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("precision", TOLERANCE, ids=str)
def test_every_candidate_multiplies_by_the_stored_weight(name: str, precision: torch.dtype) -> None:
    stored = random_codes(128, 256, SCHEMES[name])
    weight = grouped_weight(stored)
    torch.testing.assert_close(weight.dequantize(), stored.dequantize(), rtol=1e-5, atol=1e-6)
    assert (weight.shift is None) == SCHEMES[name].symmetric
    kernels = pack_kernels(weight, precision, PackedCodes())
    assert kernels.shape == (128, 256)
    for rows in (1, 3, 40):
        x = torch.randn(rows, 256)
        for label, multiply in kernels.candidates(rows).items():
            found = multiply(x)
            assert found.shape == (rows, 128)
            assert error(found, x @ stored.dequantize().T) < TOLERANCE[precision], label


@pytest.mark.parametrize("block", BLOCK_SCHEMES)
def test_blocks_of_ggml_are_multiplied_too(block: str) -> None:
    stored = random_blocks(block)
    weight = grouped_weight(stored)
    torch.testing.assert_close(weight.dequantize(), dequantize(stored), rtol=1e-5, atol=1e-3)
    kernels = pack_kernels(weight, torch.float32, PackedCodes())
    assert isinstance(kernels, BagKernels)
    x = torch.randn(2, 512)
    for multiply in kernels.candidates(2).values():
        assert error(multiply(x), x @ dequantize(stored).T) < 5e-6


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("precision", TOLERANCE, ids=str)
def test_a8_layers_round_their_inputs_as_the_reference_does(bits: int, precision: torch.dtype) -> None:
    target = Scheme("made up", bits, 8, group_size=0 if bits == 8 else 64)
    weight = grouped_weight(random_codes(128, 256, target))
    linear = PackedLinear(pack_kernels(weight, precision, PackedCodes()), None, Choice(), 8)
    x = torch.randn(5, 256) * torch.logspace(-3, 3, 5)[:, None]
    x[2] = 0
    expected = quantize_activations(x, 8) @ weight.dequantize().T
    unrounded = x @ weight.dequantize().T
    exact = precision == torch.float32
    assert error(linear(x), expected) < (2e-6 if exact else 1e-2)
    assert not exact or error(linear(x), unrounded) > 1e-3
    assert not linear(x)[2].any()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 9), st.floats(-30, 30))
def test_digits_hold_what_float32_holds(seed: int, rows: int, exponent: float) -> None:
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 64, generator=random) * 2.0**exponent
    weight = grouped_weight(random_codes(32, 64, SCHEMES["8 bits"]))
    expected = x.double() @ weight.dequantize().double().T
    bound = x.double().abs().amax(1, keepdim=True) * weight.dequantize().double().abs().sum(1)
    for precision, digits in ((torch.float32, 2.0**-22), (torch.bfloat16, 2.0**-15)):
        kernels = pack_kernels(weight, precision, PackedCodes())
        assert isinstance(kernels, ByteKernels)
        assert ((kernels.digits(x).double() - expected).abs() <= bound * digits).all()
        assert torch.equal(kernels.digits(x, columns=True), kernels.digits(x))


@pytest.mark.parametrize("activation_bits", [8, 16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_inputs_as_columns_give_the_same_bits(activation_bits: int, symmetric: bool) -> None:
    target = Scheme("made up", 8, activation_bits, symmetric=symmetric, group_size=0)
    kernels = pack_kernels(grouped_weight(random_codes(128, 256, target)), torch.bfloat16, PackedCodes())
    for rows, tried in ((1, True), (16, True), (17, False)):
        candidates = kernels.candidates(rows)
        name = next(iter(candidates))
        assert (f"{name} as columns" in candidates) == tried
        x = torch.randn(rows, 256)
        if tried:
            found = candidates[f"{name} as columns"](x)
            assert found.is_contiguous()
            assert torch.equal(found, candidates[name](x))


@TILES
def test_tiles_unpack_to_the_weight() -> None:
    weight = grouped_weight(random_codes(192, 96, SCHEMES["asymmetric"]))
    kernels = pack_kernels(weight, torch.bfloat16, PackedCodes())
    assert isinstance(kernels, TileKernels)
    torch.testing.assert_close(kernels.weight().float(), weight.dequantize().T, rtol=2e-2, atol=2e-3)
    assert sum(tensor.nbytes for tensor in kernels.tensors()) == 192 * 96 // 2 + 192 * 3 * 4


@TILES
def test_what_fits_no_tiles_is_packed_in_bags() -> None:
    odd = grouped_weight(random_codes(72, 64, SCHEMES["symmetric"]))
    assert not fits_tiles(odd)
    assert isinstance(pack_kernels(odd, torch.bfloat16, PackedCodes()), BagKernels)
    assert isinstance(pack_kernels(odd.dequantize(), torch.bfloat16, PackedCodes()), FloatKernels)


def test_bags_take_half_a_byte_or_a_byte_a_weight() -> None:
    codes = torch.randint(-8, 8, (32, 48), dtype=torch.int8)
    assert bag_table(codes, 4).shape == (48, 16 + 4)
    assert bag_table(codes, 5).shape == (48, 32 + 8)


def test_linears_with_one_input_become_one() -> None:
    symmetric, asymmetric = SCHEMES["symmetric"], Scheme("w4a16", 4, symmetric=False, group_size=64)
    weights = [grouped_weight(random_codes(rows, 128, target)) for rows, target in ((64, symmetric), (32, asymmetric))]
    whole = concatenated(weights)
    assert whole is not None
    assert torch.equal(whole.dequantize(), torch.cat([weight.dequantize() for weight in weights]))
    assert concatenated([*weights, grouped_weight(random_codes(32, 128, SCHEMES["3 bits"]))]) is None


def test_rows_move_with_their_scales() -> None:
    weight = grouped_weight(random_codes(32, 64, SCHEMES["asymmetric"]))
    order = torch.randperm(32)
    assert torch.equal(weight.in_order(order, "any").dequantize(), weight.dequantize()[order])


def test_equal_codes_are_held_once_and_only_while_used() -> None:
    packed, unpacked = PackedCodes(), []

    def scaled(factor: float, key: str) -> GroupedWeight:
        stored = random_codes(64, 64, SCHEMES["symmetric"])
        plain = grouped_weight(IntegerTensor(stored.codes, stored.scale * factor, None, stored.scheme), (key,))
        return GroupedWeight(
            lambda: (unpacked.append(key), plain.codes())[1], plain.scale, plain.shift, (64, 64), 4, key=(key,)
        )

    for precision in TOLERANCE:
        one, two, other = (pack_kernels(scaled(*pair), precision, packed) for pair in ((1, "a"), (2, "a"), (1, "b")))
        assert one.tensors()[0] is two.tensors()[0]
        assert one.tensors()[1] is not two.tensors()[1]
        assert one.tensors()[0] is not other.tensors()[0]
    assert unpacked == ["a", "b"] * 2
    del one, two, other
    assert not packed._codes


class Waiting:
    """Kernels whose candidates take a given time."""

    kind, shape = "waiting", (4, 4)

    def __init__(self, **seconds: float) -> None:
        self.seconds, self.calls = seconds, []  # type: ignore[var-annotated]

    def candidates(self, rows: int) -> Mapping[str, Multiply]:
        return {name: lambda x, name=name: self.run(name, x) for name in self.seconds}  # type: ignore[misc]

    def tensors(self) -> tuple[Tensor, ...]:
        return ()

    def run(self, name: str, x: Tensor) -> Tensor:
        self.calls.append(name)
        self.clock.now += self.seconds[name]
        return x

    class clock:  # noqa: N801
        now = 0.0


def test_the_fastest_is_measured_once_and_may_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.perf_counter", lambda: Waiting.clock.now)
    kernels, choice = Waiting(slow=0.9, fast=0.1, close=0.2), Choice()
    choice.multiply(kernels, torch.zeros(5, 4))
    assert kernels.calls == ["slow", "fast", "close", "fast", "close", "fast", "close", "fast"]
    kernels.calls.clear()
    choice.multiply(kernels, torch.zeros(7, 4))  # as many bits as 5
    assert kernels.calls == ["fast"]
    choice.multiply(kernels, torch.zeros(8, 4))
    assert len(kernels.calls) > 2
    forced = Waiting(slow=0.9, fast=0.1)
    Choice("slow").multiply(forced, torch.zeros(5, 4))
    assert forced.calls == ["slow"]
