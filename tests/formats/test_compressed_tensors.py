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
    CompressedTensorsWriter,
    encode,
    write_shared,
)
from moqe.formats.compressed_tensors_files import CompressedTensorsFiles
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
    for layout in (words, words.T.contiguous().T):
        assert torch.equal(unpack(layout, bits, columns), codes.to(torch.uint8))


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
    scheme("w2a16", symmetric=True),
    scheme("w8a8"),
    scheme("w4a8"),
]
ASYMMETRIC = [scheme("w3a16"), scheme("w2a16"), scheme("w4a16", symmetric=False), scheme("w8a8", symmetric=False)]


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


@pytest.mark.parametrize("architecture", ["Llama", "Qwen2"])
@pytest.mark.filterwarnings("ignore")
def test_other_architectures_with_an_untied_head_and_substituted_layers(tmp_path: Path, architecture: str) -> None:
    from transformers import AutoModelForCausalLM

    base = tiny_base(tmp_path / "base", architecture, tied=False)
    target = scheme("w4a16")
    others = {"down_proj": scheme("w4a16", group_size=32), "o_proj": scheme("w4a16", group_size=0), "gate_proj": None}
    folder = write_expert(tmp_path, base, target, **others)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    groups = config["config_groups"]
    assert [groups[name]["weights"]["group_size"] for name in sorted(groups)] == [128, None, 32]
    assert groups["group_1"]["targets"] == [f"model.layers.{block}.self_attn.o_proj" for block in range(BLOCKS)]
    assert config["ignore"] == ["lm_head", *(f"model.layers.{block}.mlp.gate_proj" for block in range(BLOCKS))]
    files = CompressedTensorsFiles(folder)
    assert isinstance(files.load("model.layers.1.mlp.gate_proj.weight"), Tensor)
    down = files.load("model.layers.1.mlp.down_proj.weight")
    assert isinstance(down, IntegerTensor)
    assert down.scheme.group_size == 32
    assert "lm_head.weight" in files.names()
    skeleton = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(TOKENS).logits
    torch.testing.assert_close(ReferenceRuntime(skeleton, files).logits(TOKENS), theirs, rtol=1e-3, atol=1e-3)


def test_config_says_what_loaders_need(tmp_path: Path, base: Path) -> None:
    folder = write_expert(tmp_path, base, scheme("w4a8"))
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors"
    assert config["quantization_status"] == "compressed"
    assert config["format"] == "int-quantized"
    assert config["ignore"] == ["lm_head"]
    assert config["config_groups"]["group_0"]["input_activations"]["strategy"] == "token"


def test_shared_tensors_are_stored_once(tmp_path: Path, base: Path) -> None:
    (base / "tokenizer.json").write_text("{}")
    targets = [scheme("w4a16"), scheme("w8a16")]
    for number, target in enumerate(targets):
        writer = CompressedTensorsWriter(tmp_path / str(number), base, tmp_path / "shared", target, BLOCKS)
        for block in range(BLOCKS):
            writer.write(block, block_tensors(base, block, target))
        writer.finish()
    shared = tmp_path / "shared" / SHARED_TENSORS
    assert shared.stat().st_nlink == 3
    assert (tmp_path / "1" / "tokenizer.json").samefile(tmp_path / "shared" / "tokenizer.json")
    assert "lm_head.weight" not in read_header(shared)
    apart = sum(disk_bytes(tmp_path / name) for name in ("0", "1", "shared"))
    assert disk_bytes(tmp_path) < apart - 1.9 * shared.stat().st_size


def test_an_interrupted_expert_is_continued_to_the_same_bytes(tmp_path: Path, base: Path) -> None:
    target = scheme("w4a16", group_size=64)
    whole = write_expert(tmp_path / "whole", base, target)
    arguments = (tmp_path / "part" / "expert", base, tmp_path / "part" / "shared", target, BLOCKS)
    first = CompressedTensorsWriter(*arguments)
    first.write(0, block_tensors(base, 0, target))
    (tmp_path / "part" / "expert" / "model-00003-of-00003.safetensors.partial").write_bytes(b"half")
    second = CompressedTensorsWriter(*arguments)
    assert [second.has(block) for block in range(BLOCKS)] == [True, False]
    with pytest.raises(CheckpointError, match=r"config\.json does not exist"):
        CompressedTensorsFiles(tmp_path / "part" / "expert")
    second.write(1, block_tensors(base, 1, target))
    second.finish()
    names = sorted(path.name for path in whole.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "part" / "expert").iterdir())
    assert all((whole / name).read_bytes() == (tmp_path / "part" / "expert" / name).read_bytes() for name in names)


def test_a_tensor_of_another_scheme_is_refused(tmp_path: Path, base: Path) -> None:
    writer = CompressedTensorsWriter(tmp_path / "e", base, tmp_path / "s", scheme("w4a16"), BLOCKS)
    with pytest.raises(CheckpointError, match=r"model\.layers\.0.*w8a16.*w4a16"):
        writer.write(0, block_tensors(base, 0, scheme("w8a16")))
    assert not writer.has(0)


def damaged(folder: Path, how: str) -> None:
    shard = folder / "model-00002-of-00003.safetensors"
    content = shard.read_bytes()
    if how == "missing":
        shard.unlink()
    elif how == "truncated":
        shard.write_bytes(content[:-100])
    elif how == "empty":
        shard.write_bytes(b"")
    elif how == "header":
        shard.write_bytes(content[:8] + b"\xff" * 64 + content[72:])
    elif how == "another shard":
        shard.write_bytes((folder / "model-00003-of-00003.safetensors").read_bytes())


@pytest.mark.parametrize("how", ["missing", "truncated", "empty", "header", "another shard"])
def test_a_damaged_shard_is_named(tmp_path: Path, base: Path, how: str) -> None:
    folder = write_expert(tmp_path, base, scheme("w4a16"))
    damaged(folder, how)
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003\.safetensors.*again"):
        CompressedTensorsFiles(folder)


def theirs(folder: Path, weights: dict[str, Any], tensors: dict[str, Tensor], **changes: Any) -> Path:
    """A folder with one linear, as another program would write it."""
    group = {"targets": ["re:.*proj"], "weights": weights, **changes.pop("group", {})}
    quantization = {"config_groups": {"group_0": group}, "format": "pack-quantized", "ignore": [], **changes}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    save_tensors(folder / "model.safetensors", {f"model.layers.0.up_proj.{key}": t for key, t in tensors.items()})
    return folder


NAME = "model.layers.0.up_proj.weight"
INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 16}


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("strategy", ["tensor", "channel", "group"])
def test_what_compressed_tensors_compresses_is_read(tmp_path: Path, bits: int, symmetric: bool, strategy: str) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    size = 16 if strategy == "group" else None
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy, "group_size": size}
    layer = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))
    shape = {"tensor": (1,), "channel": (16, 1), "group": (16, 4)}[strategy]
    state = {"weight": torch.randn(16, 64), "weight_scale": torch.rand(shape) * 0.2 + 0.1}
    if not symmetric:
        state["weight_zero_point"] = torch.randint(-2, 3, shape, dtype=torch.int8)
    for form in ("pack-quantized", "int-quantized"):
        compressor = BaseCompressor.get_value_from_registry(form)
        stored = compressor.compress(state, layer)
        expected = compressor.decompress(stored, layer)["weight"]
        got = CompressedTensorsFiles(theirs(tmp_path / form, weights, stored)).load(NAME)
        assert isinstance(got, IntegerTensor)
        torch.testing.assert_close(got.dequantize(), expected, rtol=1e-6, atol=1e-6)


def test_scattered_groups_are_read_as_floats(tmp_path: Path) -> None:
    weight = torch.randn(8, 32)
    target = Scheme("w4a16", 4, group_size=16)
    order = torch.randperm(32)
    fields = {key.removeprefix("x."): value for key, value in encode("x", rounded(weight[:, order], target)).items()}
    group_of = torch.arange(32) // 16
    in_order = CompressedTensorsFiles(theirs(tmp_path / "a", INT4, {**fields, "weight_g_idx": group_of}))
    assert isinstance(in_order.load(NAME), IntegerTensor)
    codes = torch.empty_like(weight)
    codes[:, order] = rounded(weight[:, order], target).codes.float()
    scattered = torch.empty(32, dtype=torch.int64)
    scattered[order] = group_of
    fields["weight_packed"] = pack((codes + 8).to(torch.uint8), 4)
    got = CompressedTensorsFiles(theirs(tmp_path / "b", INT4, {**fields, "weight_g_idx": scattered})).load(NAME)
    assert isinstance(got, Tensor)
    torch.testing.assert_close(got[:, order], rounded(weight[:, order], target).dequantize())


def test_three_bit_codes_of_older_releases_are_read(tmp_path: Path) -> None:
    tensor = rounded(torch.randn(4, 64), Scheme("w3a16", 3, group_size=16))
    fields = {key.removeprefix("x."): value for key, value in encode("x", tensor).items()}
    padded = torch.zeros(4, 70, dtype=torch.int64)
    padded[:, :64] = tensor.codes + 4
    fields["weight_packed"] = (padded.view(4, 7, 10) << torch.arange(10) * 3).sum(-1).to(torch.int32)
    got = CompressedTensorsFiles(theirs(tmp_path, {**INT4, "num_bits": 3}, fields)).load(NAME)
    assert isinstance(got, IntegerTensor)
    assert torch.equal(got.codes, tensor.codes)


@pytest.mark.parametrize(
    ("weights", "changes", "message"),
    [
        ({**INT4, "type": "float", "num_bits": 8}, {}, "fp8"),
        ({**INT4, "strategy": "block"}, {}, "block"),
        (INT4, {"kv_cache_scheme": {"num_bits": 8}}, "key-value cache"),
        (INT4, {"transform_config": {"config_groups": {"u": {}}}}, "rotated"),
        (INT4, {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse"),
        (INT4, {"group": {"input_activations": {"num_bits": 8, "strategy": "tensor", "dynamic": False}}}, "per token"),
        (INT4, {"group": {"input_activations": {"num_bits": 8, "symmetric": False}}}, "symmetric"),
        (INT4, {"group": {"output_activations": {"num_bits": 8}}}, "outputs"),
        (INT4, {"config_groups": {"group_0": {"targets": ["Linear"]}}}, "malformed"),
    ],
)
def test_what_would_not_run_exactly_is_refused(tmp_path: Path, weights: Any, changes: Any, message: str) -> None:
    folder = theirs(tmp_path, weights, {"weight": torch.zeros(2, 16)}, **changes)
    with pytest.raises(CheckpointError, match=message):
        CompressedTensorsFiles(folder)


def test_inconsistent_tensors_are_refused(tmp_path: Path) -> None:
    fields = {key.removeprefix("x."): value for key, value in encode("x", rounded(torch.randn(8, 32), GROUP16)).items()}
    unquantized = CompressedTensorsFiles(theirs(tmp_path / "0", INT4, {"weight": torch.zeros(8, 32)}))
    with pytest.raises(CheckpointError, match="full precision though"):
        unquantized.load(NAME)
    for number, (field, tensor) in enumerate(
        {
            "weight_packed": fields["weight_packed"][:, :-1],
            "weight_scale": fields["weight_scale"][:, :1].repeat(1, 3),
            "weight_shape": torch.tensor([8, 64]),
        }.items(),
        start=1,
    ):
        files = CompressedTensorsFiles(theirs(tmp_path / str(number), INT4, {**fields, field: tensor}))
        with pytest.raises(CheckpointError, match=r"up_proj\.weight is damaged"):
            files.load(NAME)


GROUP16 = Scheme("w4a16", 4, group_size=16)


def test_shared_tensors_lie_outside_the_blocks(tmp_path: Path, base: Path) -> None:
    write_shared(base, tmp_path)
    names = set(read_header(tmp_path / SHARED_TENSORS))
    assert names == {"model.embed_tokens.weight", "model.norm.weight"}
    assert not any(in_block(name) for name in names)
    before = (tmp_path / SHARED_TENSORS).stat().st_mtime_ns
    write_shared(base, tmp_path)
    assert (tmp_path / SHARED_TENSORS).stat().st_mtime_ns == before
