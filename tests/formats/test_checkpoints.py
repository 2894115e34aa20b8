from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from moqe.errors import CheckpointError
from moqe.formats import open_expert, same_tokenizer
from moqe.formats.safetensors_folder import save_tensors
from moqe.quantized import IntegerTensor
from moqe.runtimes.reference import ReferenceRuntime

LINEAR = "model.layers.0.mlp.up_proj"
NAME = f"{LINEAR}.weight"
ROWS, COLUMNS, GROUP = 32, 64, 32
Integers = NDArray[np.int64]


def bits_to_words(values: Integers, bits: int) -> Tensor:
    """Pack the rows of `values` as GPTQ does, one bit at a time."""
    words = np.zeros((values.shape[0], values.shape[1] * bits // 32), dtype=np.uint32)
    for row in range(values.shape[0]):
        stream = [(int(value) >> bit) & 1 for value in values[row] for bit in range(bits)]
        for position, bit in enumerate(stream):
            words[row, position // 32] |= np.uint32(bit << (position % 32))
    return torch.from_numpy(words.view(np.int32))


def awq_words(values: Integers) -> Tensor:
    """Pack the rows of `values` as AutoAWQ's GEMM layout does, one nibble at a time."""
    words = np.zeros((values.shape[0], values.shape[1] // 8), dtype=np.uint32)
    for row in range(values.shape[0]):
        for column in range(values.shape[1] // 8):
            for nibble, output in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
                words[row, column] |= np.uint32(values[row, column * 8 + output] << (4 * nibble))
    return torch.from_numpy(words.view(np.int32))


class Layer:
    """Random codes, zero points and scales of one linear, and the weights they stand for, by a plain loop."""

    def __init__(self, bits: int, *, symmetric: bool = False, order: bool = False, group: int = GROUP) -> None:
        random = np.random.default_rng(bits)
        groups = COLUMNS // group
        self.codes: Integers = random.integers(0, 1 << bits, (ROWS, COLUMNS))
        self.zero: Integers = random.integers(0, 1 << bits, (ROWS, groups))
        self.zero[0, 0] = 0  # the zero point whose predecessor wraps around
        if symmetric:
            self.zero[:] = 1 << (bits - 1)
        self.scale = random.uniform(0.01, 0.1, (ROWS, groups)).astype(np.float16)
        self.group_of: Integers = np.arange(COLUMNS) // group
        if order:
            self.group_of = random.permutation(self.group_of)
        self.weight = np.zeros((ROWS, COLUMNS), dtype=np.float32)
        for row in range(ROWS):
            for column in range(COLUMNS):
                part = self.group_of[column]
                scale = np.float32(self.scale[row, part])
                self.weight[row, column] = np.float32(self.codes[row, column] - self.zero[row, part]) * scale

    def gptq(self, bits: int, version: int) -> dict[str, Tensor]:
        zero = (self.zero - (version == 1)) % (1 << bits)
        return {
            "qweight": bits_to_words(self.codes, bits).T.contiguous(),
            "qzeros": bits_to_words(zero.T, bits),
            "scales": torch.from_numpy(self.scale.T.copy()),
            "g_idx": torch.from_numpy(self.group_of.astype(np.int32)),
        }

    def awq(self) -> dict[str, Tensor]:
        return {
            "qweight": awq_words(self.codes.T),
            "qzeros": awq_words(self.zero.T),
            "scales": torch.from_numpy(self.scale.T.copy()),
        }


def folder(path: Path, quantization: dict[str, Any] | None, fields: dict[str, Tensor]) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    config = {"model_type": "llama"} | ({"quantization_config": quantization} if quantization else {})
    (path / "config.json").write_text(json.dumps(config))
    tensors = {f"{LINEAR}.{field}": tensor for field, tensor in fields.items()}
    save_tensors(path / "model.safetensors", tensors | {"model.norm.weight": torch.ones(4)})
    return path


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("version", [1, 2])
def test_gptq_equals_a_naive_packer(tmp_path: Path, bits: int, version: int) -> None:
    layer = Layer(bits)
    config = {"quant_method": "gptq", "bits": bits, "group_size": GROUP}
    config |= {"checkpoint_format": "gptq_v2"} if version == 2 else {}
    files = open_expert(folder(tmp_path, config, layer.gptq(bits, version)))
    assert files.format == "gptq"
    assert files.names() == [NAME, "model.norm.weight"]
    got = files.load(NAME)
    assert isinstance(got, IntegerTensor)
    assert got.zero_point is not None
    assert got.scheme.group_size == GROUP
    assert got.scale.dtype == torch.float16
    assert np.array_equal(got.codes.numpy(), layer.codes)
    assert np.array_equal(got.zero_point.numpy(), layer.zero)
    assert np.array_equal(got.dequantize().numpy(), layer.weight)
    assert files.activation_bits(NAME) == 16
    assert torch.equal(torch.as_tensor(files.load("model.norm.weight")), torch.ones(4))


def test_gptq_with_symmetric_grids_and_one_group(tmp_path: Path) -> None:
    layer = Layer(4, symmetric=True, group=COLUMNS)
    fields = layer.gptq(4, 1)
    del fields["g_idx"]
    config = {"quant_method": "gptq", "bits": 4, "group_size": -1}
    got = open_expert(folder(tmp_path, config, fields)).load(NAME)
    assert isinstance(got, IntegerTensor)
    assert got.zero_point is None
    assert (got.scheme.symmetric, got.scheme.group_size) == (True, 0)
    assert np.array_equal(got.dequantize().numpy(), layer.weight)


def test_gptq_in_activation_order_is_read_as_floats(tmp_path: Path) -> None:
    layer = Layer(4, order=True)
    config = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": True}
    got = open_expert(folder(tmp_path, config, layer.gptq(4, 1))).load(NAME)
    assert isinstance(got, Tensor)
    assert np.array_equal(got.numpy(), layer.weight)


def test_a_gptq_layer_may_have_other_bits_than_the_config(tmp_path: Path) -> None:
    layer = Layer(8)
    config = {"quant_method": "gptq", "bits": 4, "dynamic": {"+:.*up_proj": {"bits": 8}}}
    got = open_expert(folder(tmp_path, config, layer.gptq(8, 1))).load(NAME)
    assert isinstance(got, IntegerTensor)
    assert np.array_equal(got.dequantize().numpy(), layer.weight)


def test_awq_equals_a_naive_packer(tmp_path: Path) -> None:
    layer = Layer(4)
    files = open_expert(folder(tmp_path, {"quant_method": "awq", "bits": 4, "version": "gemm"}, layer.awq()))
    assert files.format == "awq"
    got = files.load(NAME)
    assert isinstance(got, IntegerTensor)
    assert np.array_equal(got.codes.numpy(), layer.codes)
    assert np.array_equal(got.dequantize().numpy(), layer.weight)


def test_awq_equals_compressed_tensors_own_converter() -> None:
    from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter

    layer = Layer(4)
    fields = layer.awq()
    codes, _, zero = AutoAWQConverter()._convert_gemm_module(fields["qweight"], fields["scales"], fields["qzeros"])
    assert zero is not None
    assert np.array_equal(codes.numpy() + 8, layer.codes)  # so the naive packer above is the real layout
    assert np.array_equal(zero.numpy() + 8, layer.zero)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "one kernel"),
        ({"quant_method": "gptq", "bits": 5}, "5 is not a number of bits"),
        ({"quant_method": "gptq", "bits": 4, "pack_dtype": "int64"}, "int64"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "gemv"),
        ({"quant_method": "awq", "bits": 8}, "8 bits"),
        ({"quant_method": "bitsandbytes"}, "bitsandbytes; MoQE reads compressed-tensors, gptq, awq, GGUF"),
    ],
)
def test_layouts_that_are_not_read_are_refused(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_expert(folder(tmp_path, config, Layer(4).awq()))


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("qweight", lambda tensor: tensor[:-1]),
        ("qzeros", lambda tensor: tensor[:1]),
        ("scales", lambda tensor: tensor[:, :3]),
        ("g_idx", lambda tensor: tensor + 1),
        ("g_idx", lambda tensor: tensor[:0]),
    ],
)
def test_damaged_gptq_layers_are_named(tmp_path: Path, field: str, change: Any) -> None:
    fields = Layer(4).gptq(4, 1)
    fields[field] = change(fields[field])
    files = open_expert(folder(tmp_path, {"quant_method": "gptq", "bits": 4}, fields))
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*up_proj\.weight is damaged"):
        files.load(NAME)


def test_missing_fields_are_named(tmp_path: Path) -> None:
    fields = Layer(4).gptq(4, 1)
    del fields["scales"]
    files = open_expert(folder(tmp_path, {"quant_method": "gptq", "bits": 4}, fields))
    with pytest.raises(CheckpointError, match=r"lacks the tensor .*up_proj\.scales"):
        files.load(NAME)


def test_a_full_precision_folder_is_an_expert(tmp_path: Path) -> None:
    weight = torch.randn(4, 4, dtype=torch.bfloat16)
    files = open_expert(folder(tmp_path, None, {"weight": weight, "codes": torch.ones(2, dtype=torch.int32)}))
    assert files.format == "full-precision"
    assert torch.equal(torch.as_tensor(files.load(NAME)), weight)
    with pytest.raises(CheckpointError, match="holds integers"):
        files.load(f"{LINEAR}.codes")


def test_paths_without_an_expert_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        open_expert(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="no expert"):
        open_expert(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"no safetensors file \(pickled"):
        open_expert(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        open_expert(tmp_path)


def test_a_whole_gptq_model_runs_on_the_skeleton(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    tensors: dict[str, Tensor] = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    changed = LlamaForCausalLM(config)
    changed.load_state_dict(model.state_dict())
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear) or name == "lm_head":
            continue
        rows, columns = module.weight.shape
        scale = module.weight.detach().abs().amax(1, keepdim=True).div(7).half()
        codes = (module.weight.detach() / scale.float()).round().clamp(-8, 7)
        tensors[f"{name}.qweight"] = bits_to_words(codes.long().numpy() + 8, 4).T.contiguous()
        tensors[f"{name}.qzeros"] = bits_to_words(np.full((1, rows), 7), 4)
        tensors[f"{name}.scales"] = scale.T.contiguous()
        tensors[f"{name}.g_idx"] = torch.zeros(columns, dtype=torch.int32)
        tensors[f"{name}.bias"] = torch.zeros(rows)
        changed.get_submodule(name).weight = torch.nn.Parameter(codes * scale.float())
    tensors |= {
        name: parameter.detach()
        for name, parameter in model.named_parameters()
        if f"{name.removesuffix('.weight')}.scales" not in tensors
    }
    save_tensors(tmp_path / "gptq_model-4bit.safetensors", tensors)
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "gptq", "bits": 4}}))
    tokens = torch.arange(24).view(2, 12)
    got = ReferenceRuntime(model, open_expert(tmp_path)).logits(tokens)
    with torch.no_grad():
        torch.testing.assert_close(got, changed(tokens).logits)
    assert not torch.allclose(got, ReferenceRuntime(model).logits(tokens))


def gguf_file(path: Path, tokens: list[str]) -> Path:
    import gguf

    path.parent.mkdir()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_head_count(2)
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL, gguf.TokenType.NORMAL, gguf.TokenType.NORMAL])
    writer.add_tensor("blk.0.attn_norm.weight", np.ones(8, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf_files_and_folders_are_opened(tmp_path: Path) -> None:
    path = gguf_file(tmp_path / "expert" / "model.gguf", ["a", "b", "ab"])
    (tmp_path / "expert" / "config.json").write_text("{}")  # as on the hub
    for where in (path, path.parent):
        files = open_expert(where)
        assert files.format == "gguf"
        assert files.names() == ["model.layers.0.input_layernorm.weight"]


def test_the_tokenizer_of_a_gguf_file_is_compared(tmp_path: Path) -> None:
    base = tokenizer(tmp_path / "base", OURS)
    same_tokenizer(base, gguf_file(tmp_path / "same" / "model.gguf", ["a", "b", "ab"]))
    with pytest.raises(CheckpointError, match="pieces differ"):
        same_tokenizer(base, gguf_file(tmp_path / "theirs" / "model.gguf", ["a", "ab", "b"]))


def tokenizer(path: Path, content: dict[str, Any], indent: int | None = None) -> Path:
    path.mkdir()
    (path / "tokenizer.json").write_text(json.dumps(content, indent=indent))
    return path


VOCABULARY = {"a": 0, "b": 1, "ab": 2}
ADDED = [{"id": 3, "content": "<s>", "special": True}]
OURS = {"model": {"type": "BPE", "vocab": VOCABULARY, "merges": ["a b"]}, "added_tokens": ADDED}


@pytest.mark.parametrize(
    "theirs",
    [
        {**OURS, "model": {**OURS["model"], "merges": [["a", "b"]]}},
        {**OURS, "added_tokens": []},
        {**OURS, "added_tokens": [*ADDED, {"id": 4, "content": "<pad>"}]},
        {**OURS, "model": {**OURS["model"], "vocab": {**VOCABULARY, "<s>": 3}}},
    ],
)
def test_the_same_tokenizer_in_another_guise_is_accepted(tmp_path: Path, theirs: dict[str, Any]) -> None:
    base = tokenizer(tmp_path / "base", OURS)
    same_tokenizer(base, tokenizer(tmp_path / "theirs", theirs, indent=2))


@pytest.mark.parametrize(
    "theirs",
    [
        {**OURS, "model": {**OURS["model"], "merges": []}},
        {**OURS, "model": {**OURS["model"], "vocab": {"a": 1, "b": 0, "ab": 2}}},
        {**OURS, "model": {**OURS["model"], "vocab": {"a": 0, "b": 1, "ab": 2, "ba": 4}}},
        {**OURS, "model": {**OURS["model"], "vocab": {"a": 0, "b": 1}}},
        {**OURS, "added_tokens": [{"id": 3, "content": "<pad>"}]},
        {**OURS, "added_tokens": [{"id": 4, "content": "<s>"}]},
        {"model": {"type": "Unigram", "vocab": [["b", -1.0], ["a", -2.0]]}},
    ],
)
def test_another_tokenizer_is_refused(tmp_path: Path, theirs: dict[str, Any]) -> None:
    base = tokenizer(tmp_path / "base", OURS)
    with pytest.raises(CheckpointError, match=r"theirs has another tokenizer than the base model .*base"):
        same_tokenizer(base, tokenizer(tmp_path / "theirs", theirs))


def test_a_checkpoint_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    base = tokenizer(tmp_path / "base", OURS)
    with pytest.raises(CheckpointError, match=r"theirs/tokenizer\.json does not exist"):
        same_tokenizer(base, tmp_path / "theirs")
    with pytest.raises(CheckpointError, match="no tokenizer"):
        same_tokenizer(base, tokenizer(tmp_path / "theirs", {"model": {}}))
