from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moqe.formats.ggml_blocks import pack, unpack
from moqe.formats.gguf_codes import to_blocks
from moqe.quantized import IntegerTensor
from moqe.schemes import SCHEMES, Scheme

ROWS, COLUMNS = 8, 128


def integers(
    bits: int, symmetric: bool, group: int, scale_dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> IntegerTensor:
    """Random codes of the whole range, scales as those of a language model, zero points near the middle."""
    random = torch.Generator().manual_seed(seed)
    scheme = Scheme("test", bits, symmetric=symmetric, group_size=group)
    low, high = scheme.levels
    codes = torch.randint(low, high + 1, (ROWS, COLUMNS), generator=random)
    groups = COLUMNS // (group or COLUMNS)
    scale = (0.01 * torch.rand(ROWS, groups, generator=random) + 1e-4).to(scale_dtype)
    zero = None
    if not symmetric:
        half = 1 << (bits - 1)
        zero = torch.randint(half - 2, half + 2, scale.shape, generator=random).clamp(low, high).to(torch.uint8)
    return IntegerTensor(codes.to(torch.int8 if symmetric else torch.uint8), scale, zero, scheme)


def stored(tensor: IntegerTensor, **options: bool) -> tuple[str, Tensor]:
    """The block type, and the weights after a way through the file's bytes."""
    blocks = to_blocks(tensor, **options).tensor
    return blocks.scheme.name, unpack(pack(blocks), blocks.scheme).dequantize()


@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    symmetric=st.booleans(),
    group=st.sampled_from([0, 32, 64, 128]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_weights_are_equal_bit_for_bit(bits: int, symmetric: bool, group: int, dtype: torch.dtype, seed: int) -> None:
    if bits == 8 and not symmetric:
        return
    tensor = integers(bits, symmetric, group, dtype, seed)
    converted = to_blocks(tensor)
    assert (converted.rounded, converted.largest_error) == (0, 0.0)
    _, weights = stored(tensor)
    torch.testing.assert_close(weights, tensor.dequantize(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("bits", "symmetric", "expected"),
    [(2, True, "q4_0"), (3, False, "q4_0"), (4, True, "q4_0"), (4, False, "q5_0"), (8, True, "q8_0")],
)
def test_the_smallest_exact_type_is_taken(bits: int, symmetric: bool, expected: str) -> None:
    assert stored(integers(bits, symmetric, 32))[0] == expected


def test_q4_1_where_the_offsets_are_float16_numbers() -> None:
    tensor = integers(4, False, 32)
    powers = IntegerTensor(tensor.codes, torch.full_like(tensor.scale, 2.0**-7), tensor.zero_point, tensor.scheme)
    name, weights = stored(powers)
    assert name == "q4_1"
    torch.testing.assert_close(weights, powers.dequantize(), rtol=0, atol=0)


def test_rounding_gives_q4_1_and_says_what_it_did() -> None:
    tensor = integers(4, False, 32)
    converted = to_blocks(tensor, rounding=True)
    assert converted.tensor.scheme.name == "q4_1"
    error = (converted.tensor.dequantize() - tensor.dequantize()).abs().max() / tensor.dequantize().abs().max()
    assert converted.rounded > 0
    assert converted.largest_error == pytest.approx(float(error))
    assert 0 < converted.largest_error < 2**-10


def test_a_small_scale_is_refused_and_rounded_on_demand() -> None:
    tensor = integers(4, True, 32)
    tensor.scale[0, 0] = 1.1e-6
    with pytest.raises(ValueError, match="are no float16 numbers"):
        to_blocks(tensor)
    converted = to_blocks(tensor, rounding=True)
    assert converted.rounded == 1
    assert 0 < converted.largest_error < 1e-4


def test_the_smallest_scales_that_are_always_kept() -> None:
    tensor = integers(4, True, 32)
    tensor.scale.copy_(2.0**-17 * (1 + torch.arange(32).view(8, 4) / 128))
    torch.testing.assert_close(stored(tensor)[1], tensor.dequantize(), rtol=0, atol=0)


def test_the_scale_of_zeros_does_not_matter() -> None:
    tensor = integers(4, True, 32)
    tensor.codes[0, :32] = 0
    tensor.scale[0, 0] = 1e-30
    torch.testing.assert_close(stored(tensor)[1], tensor.dequantize(), rtol=0, atol=0)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="no block type has more than 8 bits"):
        to_blocks(integers(8, False, 32))
    tensor = integers(4, True, 16)
    with pytest.raises(ValueError, match="in groups of 16 do not fall into blocks of 32"):
        to_blocks(tensor)
    tensor = integers(4, True, 32, torch.float32)
    with pytest.raises(ValueError, match="are no float16 numbers"):
        to_blocks(tensor)
    tensor.scale[0, 0] = 1e6
    with pytest.raises(ValueError, match="exceeds float16"):
        to_blocks(tensor, rounding=True)
    with pytest.raises(ValueError, match="without zero points"):
        to_blocks(IntegerTensor(tensor.codes, tensor.scale, None, SCHEMES["w3a16"]))
