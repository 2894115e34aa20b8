import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize as ggml_dequantize
from hypothesis import given, settings
from hypothesis import strategies as st

from moqe.errors import CheckpointError, RecipeError
from moqe.formats.ggml_blocks import BLOCK_SCHEMES, LAYOUTS, dequantize, join_planes, pack, split_planes, unpack
from moqe.quantized import BlockTensor
from moqe.schemes import SCHEMES, Scheme

TYPES = sorted(LAYOUTS)


def random_bytes(scheme: Scheme, rows: int, blocks: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (rows, blocks * scheme.block_bytes), dtype=torch.uint8, generator=generator)


def finite_bytes(scheme: Scheme, rows: int, blocks: int, seed: int) -> torch.Tensor:
    """Random bytes whose float16 members are finite, drawn over float16's whole range."""
    generator = torch.Generator().manual_seed(seed)
    tensor = unpack(random_bytes(scheme, rows, blocks, seed), scheme)
    for name in {"d", "dmin", "m"} & tensor.fields.keys():
        magnitude = torch.rand(rows, blocks, generator=generator) * 30 - 20
        sign = torch.rand(rows, blocks, generator=generator) - 0.5
        tensor.fields[name] = (sign * 2**magnitude).to(torch.float16)
    return pack(tensor)


def test_every_block_scheme_has_a_layout_of_its_size():
    assert set(BLOCK_SCHEMES) == set(LAYOUTS)
    for block, layout in LAYOUTS.items():
        assert sum(size for _, size in layout.members) == BLOCK_SCHEMES[block].block_bytes


@pytest.mark.parametrize("block", TYPES)
@settings(max_examples=15, deadline=None)
@given(rows=st.integers(1, 3), blocks=st.integers(1, 4), seed=st.integers(0, 2**31))
def test_pack_inverts_unpack(block, rows, blocks, seed):
    raw = random_bytes(BLOCK_SCHEMES[block], rows, blocks, seed)
    tensor = unpack(raw, BLOCK_SCHEMES[block])
    assert tensor.codes.shape == (rows, blocks * BLOCK_SCHEMES[block].block_size)
    assert tensor.codes.dtype == torch.uint8
    assert torch.equal(pack(tensor), raw)


@pytest.mark.parametrize("block", TYPES)
def test_dequantize_equals_the_gguf_package_bit_for_bit(block):
    raw = finite_bytes(BLOCK_SCHEMES[block], 16, 8, seed=1)
    ours = dequantize(unpack(raw, BLOCK_SCHEMES[block])).numpy()
    theirs = ggml_dequantize(raw.numpy(), GGMLQuantizationType[block])
    assert np.isfinite(theirs).all()
    assert np.array_equal(ours.view(np.uint32), theirs.view(np.uint32))


@pytest.mark.parametrize("block", TYPES)
def test_field_types_and_ranges(block):
    scheme = BLOCK_SCHEMES[block]
    tensor = unpack(random_bytes(scheme, 4, 16, seed=2), scheme)
    assert int(tensor.codes.max()) == 2**scheme.weight_bits - 1
    assert tensor.fields["d"].dtype == torch.float16
    assert tensor.fields["d"].shape == (4, 16)
    if scheme.block_size == 256:
        assert tensor.fields["scales"].shape[:2] == (4, 16)


def test_block_tensor_dequantizes_itself():
    tensor = unpack(finite_bytes(SCHEMES["q4_k"], 2, 2, seed=3), SCHEMES["q4_k"])
    assert torch.equal(tensor.dequantize(), dequantize(tensor))


def test_unpack_takes_rows_that_are_not_contiguous():
    raw = finite_bytes(SCHEMES["q6_k"], 8, 2, seed=4)
    assert torch.equal(pack(unpack(raw[::2], SCHEMES["q6_k"])), raw[::2])


def test_planes_take_low_bits_of_a_whole_group_first():
    raw = torch.tensor([[0x21, 0x43, 0x65, 0x87]], dtype=torch.uint8)
    assert split_planes(raw, 4, 2).tolist() == [[1, 3, 2, 4, 5, 7, 6, 8]]
    assert torch.equal(join_planes(split_planes(raw, 4, 2), 4, 2), raw)


def test_part_of_a_block_is_refused():
    with pytest.raises(CheckpointError, match="not made of q4_k blocks of 144 bytes"):
        unpack(torch.zeros(2, 143, dtype=torch.uint8), SCHEMES["q4_k"])


def test_integer_scheme_is_refused():
    with pytest.raises(RecipeError, match="w4a16 is not a ggml block type"):
        unpack(torch.zeros(2, 16, dtype=torch.uint8), SCHEMES["w4a16"])
    with pytest.raises(RecipeError, match="w4a16 is not a ggml block type"):
        dequantize(BlockTensor(torch.zeros(2, 16, dtype=torch.uint8), scheme=SCHEMES["w4a16"]))
