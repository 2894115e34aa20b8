"""Writing and reading GGUF experts: what is written comes back, and damage is seen."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from safetensors.torch import load_file
from transformers import AutoConfig

from moqe.errors import CheckpointError, ModelError
from moqe.formats.gguf_architecture import architecture, architecture_metadata, rope_factors
from moqe.formats.gguf_container import Container, Value, array, boolean, float32, string, uint32, write_container
from moqe.formats.gguf_files import GgufFiles
from moqe.formats.gguf_names import RowOrder, from_gguf, to_gguf
from moqe.formats.gguf_split import FIRST_FILE, SECOND_FILE, gguf_paths, merge_gguf
from moqe.formats.gguf_writer import GgufWriter
from moqe.quantized import BlockTensor, IntegerTensor
from moqe.schemes import scheme
from moqe.store import digest_file


def block_weights(base: Path, block: int) -> dict[str, torch.Tensor]:
    weights = load_file(base / "model.safetensors")
    return {name: value for name, value in weights.items() if f".layers.{block}." in name}


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_what_is_written_comes_back(
    family: str, make_base: Callable[..., Path], make_expert: Callable[..., Path]
) -> None:
    base = make_base(family)
    files = GgufFiles(make_expert(base, "Q4_0"))
    expected = {**block_weights(base, 0), **block_weights(base, 1)}
    assert sorted(files.names()) == sorted(expected)
    for name, weight in expected.items():
        loaded = files.load(name)
        if weight.dim() == 1:
            assert isinstance(loaded, torch.Tensor)
            assert torch.equal(loaded, weight)
        else:
            rounded = gguf.quants.quantize(weight.numpy(), GGMLQuantizationType.Q4_0)
            assert isinstance(loaded, BlockTensor)
            assert loaded.scheme == scheme("q4_0")
            assert np.array_equal(
                loaded.dequantize().numpy(), gguf.quants.dequantize(rounded, GGMLQuantizationType.Q4_0)
            )
    assert files.activation_bits(files.names()[0]) == 16


def test_tensors_around_the_blocks_are_stored_once(
    make_base: Callable[..., Path], make_expert: Callable[..., Path]
) -> None:
    base = make_base("llama", dtype=torch.bfloat16, tie_word_embeddings=False)
    first, second = make_expert(base, "Q4_0", "first"), make_expert(base, "Q8_0", "second")
    assert (first / SECOND_FILE).samefile(second / SECOND_FILE)
    embeddings = load_file(base / "model.safetensors")["lm_head.weight"]
    loaded = GgufFiles(first).load("lm_head.weight")
    assert isinstance(loaded, torch.Tensor)
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(loaded, embeddings)


def test_a_resumed_writer_gives_the_same_bytes(
    tmp_path: Path, make_base: Callable[..., Path], make_expert: Callable[..., Path]
) -> None:
    base = make_base("qwen3")
    whole = make_expert(base)

    def writer() -> GgufWriter:
        return GgufWriter(tmp_path / "again", base, tmp_path / "other", scheme("q8_0"), 2, tmp_path / "parts")

    writer().write(1, block_weights(base, 1))
    resumed = writer()
    assert [resumed.has(0), resumed.has(1)] == [False, True]
    resumed.write(0, block_weights(base, 0))
    resumed.finish()
    for name in (FIRST_FILE, SECOND_FILE):
        assert digest_file(tmp_path / "again" / name) == digest_file(whole / name)
    assert writer().has(0)
    assert list((tmp_path / "parts").iterdir()) == []
    writer().finish()  # nothing left to do
    assert digest_file(tmp_path / "again" / FIRST_FILE) == digest_file(whole / FIRST_FILE)


def test_a_block_must_be_complete_and_of_block_types(tmp_path: Path, make_base: Callable[..., Path]) -> None:
    base = make_base("qwen3")
    writer = GgufWriter(tmp_path / "expert", base, tmp_path / "shared", scheme("q8_0"), 2, tmp_path / "parts")
    tensors: dict[str, Any] = block_weights(base, 0)
    norm = "model.layers.0.input_layernorm.weight"
    with pytest.raises(ModelError, match=f"block 0 lacks {norm}"):
        writer.write(0, {name: value for name, value in tensors.items() if name != norm})
    codes = torch.zeros(256, 256, dtype=torch.int8)
    tensors["model.layers.0.mlp.up_proj.weight"] = IntegerTensor(codes, torch.ones(256, 1), None, scheme("w8a16"))
    with pytest.raises(CheckpointError, match="GGUF holds block schemes"):
        writer.write(0, tensors)
    assert not writer.has(0)
    with pytest.raises(CheckpointError, match="does not exist"):
        writer.finish()
    assert not (tmp_path / "expert" / FIRST_FILE).exists()


def test_merged_file_equals_the_split_ones(
    tmp_path: Path, make_base: Callable[..., Path], make_expert: Callable[..., Path]
) -> None:
    expert = make_expert(make_base("llama"), "Q4_0")
    merge_gguf(expert / FIRST_FILE, tmp_path / "merged.gguf")
    merged, split = Container(tmp_path / "merged.gguf"), Container(expert / FIRST_FILE)
    kept = {key: value for key, value in split.metadata.items() if not key.startswith("split.")}
    assert merged.metadata == kept
    assert set(merged.tensors) == set(split.tensors) | set(Container(expert / SECOND_FILE).tensors)
    for name in split.tensors:
        assert torch.equal(merged.raw(name), split.raw(name))


def test_container_is_read_as_the_gguf_package_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    metadata = {
        "general.architecture": string("llama"),
        "a.text": string("Größe"),
        "a.number": uint32(7),
        "a.small": Value(-3, gguf.GGUFValueType.INT8),
        "a.float": float32(0.5),
        "a.truth": boolean(True),
        "a.texts": array(["x", "", "\udcff"], gguf.GGUFValueType.STRING),
        "a.numbers": array([1.5, -2.0], gguf.GGUFValueType.FLOAT32),
        "a.empty": array([], gguf.GGUFValueType.INT32),
    }
    writer = GGUFWriter(path, "llama")
    values = {"odd": np.arange(5, dtype=np.float32), "matrix": np.arange(12, dtype=np.float16).reshape(3, 4)}
    for name, value in values.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    source = Container(path)
    target = tmp_path / "y.gguf"
    write_container(target, metadata, list(source.tensors.values()), lambda record: source.raw(record.name))
    ours, theirs = Container(target), GGUFReader(target)
    assert ours.metadata == {key: value for key, value in metadata.items() if value.value != []}
    for tensor in theirs.tensors:
        assert ours.tensors[tensor.name].offset == tensor.data_offset
        assert np.array_equal(tensor.data, values[tensor.name])
        assert ours.raw(tensor.name).numpy().tobytes() == values[tensor.name].tobytes()


def test_foreign_file_with_quantized_embeddings_and_other_types(tmp_path: Path) -> None:
    weight = np.random.default_rng(0).standard_normal((64, 256), dtype=np.float32)
    path = tmp_path / "theirs.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    tensors = {
        "token_embd.weight": "Q8_0",
        "blk.0.attn_q.weight": "F16",
        "blk.0.attn_v.weight": "TQ2_0",
        "blk.0.ffn_up.weight": "BF16",
    }
    for name, kind in tensors.items():
        stored = GGMLQuantizationType[kind]
        data = weight.astype(np.float16) if kind == "F16" else gguf.quants.quantize(weight, stored)
        writer.add_tensor(name, data, raw_dtype=stored)
    writer.add_tensor("rope_freqs.weight", np.ones(8, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    files = GgufFiles(path)
    prefix = "model.layers.0"
    assert files.names() == [
        "model.embed_tokens.weight",
        f"{prefix}.self_attn.q_proj.weight",
        f"{prefix}.self_attn.v_proj.weight",
        f"{prefix}.mlp.up_proj.weight",
    ]
    embeddings = files.load("model.embed_tokens.weight")
    assert isinstance(embeddings, BlockTensor)
    queries = files.load(f"{prefix}.self_attn.q_proj.weight")
    assert isinstance(queries, torch.Tensor)
    order = RowOrder(True, 4, 2).gguf_rows(f"{prefix}.self_attn.q_proj.weight", 64)
    assert torch.equal(queries[order], torch.from_numpy(weight).half())
    values = files.load(f"{prefix}.self_attn.v_proj.weight")
    assert isinstance(values, torch.Tensor)
    ternary = gguf.quants.quantize(weight, GGMLQuantizationType.TQ2_0)
    assert np.array_equal(values.numpy(), gguf.quants.dequantize(ternary, GGMLQuantizationType.TQ2_0))
    ups = files.load(f"{prefix}.mlp.up_proj.weight")
    assert isinstance(ups, torch.Tensor)
    assert torch.equal(ups, torch.from_numpy(weight).bfloat16())
    with pytest.raises(CheckpointError, match=r"has no parameter lm_head\.weight"):
        files.load("lm_head.weight")


def test_damaged_and_foreign_files_are_refused(
    tmp_path: Path, make_base: Callable[..., Path], make_expert: Callable[..., Path]
) -> None:
    expert = make_expert(make_base("qwen3"), "Q8_0")
    first = expert / FIRST_FILE
    content = first.read_bytes()
    for size, message in (
        (len(content) - 4000, "is truncated: tensor"),
        (5000, "truncated or corrupt"),
        (0, "is empty"),
    ):
        first.write_bytes(content[:size])
        with pytest.raises(CheckpointError, match=f"{FIRST_FILE} .*{message}"):
            GgufFiles(expert)
    first.write_bytes(b"PK" + content[2:])
    with pytest.raises(CheckpointError, match="is not a GGUF file"):
        GgufFiles(first)
    first.write_bytes(content.replace(b"qwen3", b"gemma"))
    with pytest.raises(CheckpointError, match="has the architecture gemma: MoQE reads llama, qwen2, qwen3"):
        GgufFiles(first)
    first.write_bytes(content.replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_ab.weight"))
    with pytest.raises(CheckpointError, match=r"blk.1.ffn_ab.weight has no counterpart"):
        GgufFiles(first)
    first.write_bytes(content)
    (expert / SECOND_FILE).unlink()
    with pytest.raises(CheckpointError, match=f"lacks {SECOND_FILE}"):
        GgufFiles(expert)


def test_a_folder_must_hold_one_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds 0 GGUF models"):
        gguf_paths(tmp_path)
    for name in ("a.gguf", "b-00001-of-00002.gguf", "b-00002-of-00002.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match="holds 2 GGUF models"):
        gguf_paths(tmp_path)
    assert gguf_paths(tmp_path / "a.gguf") == [tmp_path / "a.gguf"]
    assert [path.name for path in gguf_paths(tmp_path / "b-00002-of-00002.gguf")] == [
        "b-00001-of-00002.gguf",
        "b-00002-of-00002.gguf",
    ]
    (tmp_path / "a.gguf").unlink()
    assert len(gguf_paths(tmp_path)) == 2


def test_row_orders_are_inverse_and_stay_within_heads() -> None:
    order = RowOrder(True, heads=6, key_value_heads=2)
    for name, heads in (("q", 6), ("k", 2)):
        full = f"model.layers.3.self_attn.{name}_proj.weight"
        there, back = order.gguf_rows(full, heads * 8), order.hugging_face_rows(full, heads * 8)
        assert there is not None
        assert back is not None
        assert torch.equal(there[back], torch.arange(heads * 8))
        assert torch.equal(there // 8, torch.arange(heads * 8) // 8)
        assert there[:4].tolist() == [0, 4, 1, 5]
    assert order.gguf_rows("model.layers.3.self_attn.v_proj.weight", 16) is None
    assert RowOrder(False, 6, 2).gguf_rows("model.layers.3.self_attn.q_proj.weight", 48) is None


def test_names_go_there_and_back() -> None:
    for name in ("model.layers.12.self_attn.k_proj.bias", "model.layers.0.mlp.down_proj.weight", "lm_head.weight"):
        assert from_gguf(to_gguf(name)) == name
    with pytest.raises(ModelError, match="has no name in GGUF"):
        to_gguf("model.layers.0.mlp.experts.0.up_proj.weight")


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("gemma2", {}, "GGUF files are written for llama, mistral, qwen2, qwen3 models and this one is gemma2"),
        ("llama", {"hidden_act": "gelu"}, "activation silu and this one gelu"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "position encoding dynamic"),
        ("llama", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "rotate whole heads"),
        (
            "qwen3",
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "attention_factor": 1.5}},
            "position encoding yarn {'attention_factor': 1.5} cannot",
        ),
    ],
)
def test_what_llama_cpp_cannot_run_is_refused(family: str, options: dict[str, Any], message: str) -> None:
    if "rope_parameters" in options:
        options = {"rope_parameters": {"rope_theta": 10000.0, **options["rope_parameters"]}}
    with pytest.raises(ModelError, match=message):
        architecture_metadata(AutoConfig.for_model(family, **options), "Q4_K")


def test_llama3_factors_keep_fast_and_divide_slow_frequencies() -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = AutoConfig.for_model("llama", rope_parameters=rope)
    factors = rope_factors(config)
    assert factors is not None
    assert factors.shape == (64,)
    assert factors[0] == 1.0
    assert factors[-1] == 8.0
    assert (factors.diff() >= 0).all()
    assert rope_factors(AutoConfig.for_model("qwen3")) is None
    assert architecture(config) == "llama"
