from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moqe.errors import CheckpointError
from moqe.formats.bit_packing import pack, packed_words, unpack
from moqe.formats.compressed_tensors import (
    SHARED_TENSORS,
    CompressedTensorsFiles,
    CompressedTensorsWriter,
    encode,
    write_shared,
)
from moqe.formats.safetensors_folder import SafetensorsFolder, in_block, read_header, save_tensors
from moqe.quantized import IntegerTensor, Quantized
from moqe.runtimes.reference import ReferenceRuntime
from moqe.schemes import Scheme, scheme
from moqe.store import disk_bytes

BLOCKS = 2


def tiny_base(folder: Path, architecture: str = "Qwen3", tied: bool = True) -> Path:
    """A random two-block model, saved by transformers with bfloat16-exact float32 weights."""
    import transformers

    config = getattr(transformers, f"{architecture}Config")(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=384,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        initializer_range=0.08,
    )
    torch.manual_seed(1)
    model = getattr(transformers, f"{architecture}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    model.save_pretrained(folder)
    return folder


def rounded(weight: Tensor, target: Scheme, scale_dtype: torch.dtype = torch.bfloat16) -> IntegerTensor:
    """Plain rounding, independent of the methods."""
    rows, columns = weight.shape
    size = target.group_size or columns
    low, high = target.levels
    grouped = weight.float().view(rows, columns // size, size)
    if target.symmetric:
        scale = (grouped.abs().amax(-1) / high).to(scale_dtype)
        zero = None
        codes = grouped / scale.float()[..., None]
    else:
        lowest = grouped.amin(-1).clamp(max=0)
        scale = ((grouped.amax(-1).clamp(min=0) - lowest) / high).to(scale_dtype)
        zero = (-lowest / scale.float()).round().clamp(low, high).to(torch.uint8)
        codes = grouped / scale.float()[..., None] + zero[..., None]
    dtype = torch.int8 if target.symmetric else torch.uint8
    return IntegerTensor(codes.round().clamp(low, high).to(dtype).view(rows, columns), scale, zero, target)


def block_tensors(base: Path, block: int, target: Scheme, **others: Scheme | None) -> dict[str, Quantized | Tensor]:
    """A block's parameters, linears rounded; `others` gives single linears another scheme, or None to keep them."""
    source = SafetensorsFolder(base)
    result: dict[str, Quantized | Tensor] = {}
    for name in source.names():
        if not name.startswith(f"model.layers.{block}."):
            continue
        tensor = source.tensor(name)
        linear = name.split(".")[-2]
        own = others.get(linear, target)
        result[name] = rounded(tensor, own) if tensor.ndim == 2 and own is not None else tensor
    return result


def write_expert(folder: Path, base: Path, target: Scheme, **others: Scheme | None) -> Path:
    writer = CompressedTensorsWriter(folder / "expert", base, folder / "shared", target, BLOCKS)
    for block in range(BLOCKS):
        writer.write(block, block_tensors(base, block, target, **others))
    writer.finish()
    return folder / "expert"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def skeleton(base: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


TOKENS = torch.arange(48).view(2, 24) * 7 % 512


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 8), st.integers(1, 5), st.integers(1, 100), st.integers(0, 2**31))
def test_packing_is_undone_by_unpacking(bits: int, rows: int, columns: int, seed: int) -> None:
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=torch.Generator().manual_seed(seed))
    words = pack(codes, bits)
    assert words.shape == (rows, packed_words(columns, bits))
    assert torch.equal(unpack(words, bits, columns), codes.to(torch.uint8))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_packing_equals_compressed_tensors_own(bits: int) -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    codes = torch.randint(0, 1 << bits, (3, 77))
    signed = (codes - (1 << (bits - 1))).to(torch.int8)
    assert torch.equal(pack(codes, bits), pack_to_int32(signed, bits))


SYMMETRIC = [
    scheme("w8a16"),
    scheme("w4a16"),
    scheme("w4a16", group_size=32),
    scheme("w4a16", group_size=0),
    scheme("w3a16", symmetric=True),
    scheme("w8a8"),
    scheme("w4a8"),
]
ASYMMETRIC = [scheme("w3a16"), scheme("w4a16", symmetric=False), scheme("w8a8", symmetric=False)]


def label(value: object) -> str:
    return f"{value.name}-{value.group_size}-{value.symmetric}" if isinstance(value, Scheme) else str(value)


@pytest.mark.parametrize("target", SYMMETRIC + ASYMMETRIC, ids=label)
def test_what_is_written_is_read_back(tmp_path: Path, base: Path, target: Scheme) -> None:
    files = CompressedTensorsFiles(write_expert(tmp_path, base, target))
    for block in range(BLOCKS):
        for name, expected in block_tensors(base, block, target).items():
            got = files.load(name)
            if isinstance(expected, Tensor):
                assert isinstance(got, Tensor)
                assert torch.equal(got, expected)
                assert files.activation_bits(name) == 16
                continue
            assert isinstance(got, IntegerTensor)
            assert isinstance(expected, IntegerTensor)
            assert got.scheme == target
            assert torch.equal(got.codes, expected.codes)
            assert torch.equal(got.scale, expected.scale)
            assert (got.zero_point is None) == target.symmetric
            assert torch.equal(got.dequantize(), expected.dequantize())
            assert files.activation_bits(name) == target.activation_bits
    assert set(files.names()) == set(SafetensorsFolder(base).names())


@pytest.mark.parametrize("target", SYMMETRIC, ids=label)
@pytest.mark.filterwarnings("ignore")  # those of transformers and compressed-tensors
def test_transformers_gives_the_reference_logits(tmp_path: Path, base: Path, skeleton: Any, target: Scheme) -> None:
    from transformers import AutoModelForCausalLM

    folder = write_expert(tmp_path, base, target)
    reference = ReferenceRuntime(skeleton, CompressedTensorsFiles(folder)).logits(TOKENS)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        theirs = model(TOKENS).logits
    original = ReferenceRuntime(skeleton).logits(TOKENS)
    assert (reference - original).abs().max() > 1e-2  # quantization is visible at all
    torch.testing.assert_close(theirs, reference, rtol=1e-3, atol=1e-3)
