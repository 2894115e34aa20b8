from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoConfig, LlamaConfig, Qwen3MoeConfig

from moqe.errors import ModelError
from moqe.models.decoder import Decoder
from moqe.models.recorder import Recorder

Saved = Callable[[str], Path]
FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "gemma", "opt", "gpt_neo"]


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(0, 512, (3, 24), generator=torch.Generator().manual_seed(3))


def materialised(decoder: Decoder) -> int:
    """How many blocks hold real parameters."""
    return sum(not all(p.is_meta for p in block.parameters()) for block in decoder._blocks)


def load_last_block(folder: Path) -> None:
    decoder = Decoder.open(str(folder))
    decoder.load_block(decoder.number_of_blocks - 1)


def blockwise_logits(decoder: Decoder, tokens: Tensor) -> Tensor:
    hidden = decoder.embed(tokens)
    for index, kwargs in enumerate(decoder.block_inputs(hidden)):
        hidden = decoder.run_block(decoder.load_block(index), hidden, kwargs)
        assert materialised(decoder) == 1
        decoder.release_block(index)
    return decoder.logits(hidden)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_blockwise_logits_are_the_whole_models(saved: Saved, architecture: str, tokens: Tensor) -> None:
    decoder = Decoder.open(str(saved(architecture)))
    logits = blockwise_logits(decoder, tokens)
    with torch.no_grad():
        whole = decoder.full()(tokens).logits
    assert logits.shape == (3, 24, 512)
    torch.testing.assert_close(logits, whole, rtol=1e-5, atol=1e-5 * float(whole.abs().max()))


@pytest.mark.parametrize("architecture", ["llama", "gpt_neo"])
def test_logits_need_no_call_before(saved: Saved, architecture: str) -> None:
    decoder = Decoder.open(str(saved(architecture)))
    assert decoder.logits(torch.randn(1, 5, 256)).shape == (1, 5, 512)


def test_single_block_that_returns_a_tuple(tmp_path: Path, tokens: Tensor) -> None:
    config = GPTNeoConfig(
        hidden_size=64, num_layers=1, attention_types=[[["global"], 1]], num_heads=4, vocab_size=512, window_size=8
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    hidden = torch.randn(2, 5, 64)
    decoder, other = Decoder.open(str(tmp_path)), Decoder.open(str(tmp_path))
    other.embed(tokens)
    assert torch.equal(decoder.logits(hidden), other.logits(hidden))


def test_recorder_has_the_attributes_of_its_block() -> None:
    block = nn.Linear(2, 2)
    block.attention_type = "sliding_attention"  # type: ignore[assignment]
    recorder = Recorder(block, lambda hidden: hidden)
    assert recorder.attention_type == "sliding_attention"
    assert list(recorder.parameters()) == []
    with pytest.raises(AttributeError):
        _ = recorder.no_such_attribute


def test_recorder_names_positional_arguments() -> None:
    class Block(nn.Module):
        def forward(self, hidden: Tensor, mask: Tensor | None, *, position: int = 0) -> Tensor:
            return hidden

    recorder = Recorder(Block(), lambda hidden: hidden)
    recorder(torch.ones(1), None, position=3)
    assert dict(recorder.kwargs) == {"mask": None, "position": 3}


def test_model_larger_than_memory_is_opened(tmp_path: Path) -> None:
    LlamaConfig(
        hidden_size=1024, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=8, vocab_size=2**35
    ).save_pretrained(tmp_path)
    assert Decoder.dry(str(tmp_path)).number_of_blocks == 2


def test_nothing_is_materialised_at_first(saved: Saved) -> None:
    decoder = Decoder.open(str(saved("qwen3")))
    assert all(parameter.is_meta for parameter in decoder.model.parameters())
    assert not any(buffer.is_meta for buffer in decoder.model.buffers())


def test_embedding_is_dropped_after_use(saved: Saved, tokens: Tensor) -> None:
    decoder = Decoder.open(str(saved("llama")))
    decoder.embed(tokens)
    real = {name for name, parameter in decoder.model.named_parameters() if not parameter.is_meta}
    assert real == {"model.norm.weight"}


def test_masks_differ_between_layers_with_different_windows(saved: Saved) -> None:
    decoder = Decoder.open(str(saved("qwen2")))  # block 0 sees everything, block 1 eight tokens
    full, sliding = decoder.block_inputs(torch.randn(1, 24, 256))
    assert full["attention_mask"] is None
    assert sliding["attention_mask"] is not None


def test_released_block_comes_back_as_it_was(saved: Saved) -> None:
    decoder = Decoder.open(str(saved("llama")))
    before = {name: p.clone() for name, p in decoder.load_block(1).named_parameters()}
    with torch.no_grad():
        for parameter in decoder.load_block(1).parameters():
            parameter.zero_()
    decoder.release_block(1)
    after = dict(decoder.load_block(1).named_parameters())
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_names_cover_every_stored_parameter(saved: Saved) -> None:
    for architecture in ("llama", "qwen2", "qwen3"):
        decoder = Decoder.open(str(saved(architecture)))
        names = set(decoder.other_parameters())
        for index in range(decoder.number_of_blocks):
            names |= set(decoder.block_parameters(index))
        assert names == set(decoder.weights.names())


def test_tied_head_is_the_embedding(saved: Saved) -> None:
    tied, untied = Decoder.open(str(saved("qwen3"))), Decoder.open(str(saved("llama")))
    assert tied.head_name == tied.embedding_name == "model.embed_tokens.weight"
    assert untied.head_name == "lm_head.weight"
    assert tied.embedding().shape == (512, 256)


def test_half_precision_base_is_computed_in_float32(saved: Saved, tmp_path: Path, tokens: Tensor) -> None:
    model = Decoder.open(str(saved("llama"))).full().to(torch.bfloat16)
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    decoder = Decoder.open(str(tmp_path))
    assert decoder.stored_dtype == torch.bfloat16
    assert blockwise_logits(decoder, tokens).dtype == torch.float32
    with torch.no_grad():
        torch.testing.assert_close(blockwise_logits(decoder, tokens), decoder.full()(tokens).logits)


def test_dry_decoder_needs_only_a_config(saved: Saved, tmp_path: Path, tokens: Tensor) -> None:
    (tmp_path / "config.json").write_text((saved("qwen2") / "config.json").read_text())
    decoder = Decoder.dry(str(tmp_path))
    assert decoder.embed(tokens).shape == (3, 24, 256)
    with pytest.raises(ModelError, match=r"neither model\.safetensors"):
        Decoder.open(str(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "no-such-model"}, "check model_type"),
        ({"quantization_config": {"quant_method": "gptq"}}, "already quantized .*gptq"),
        ({"num_hidden_layers": 3}, "has no parameter 'model.layers.2"),
        ({"intermediate_size": 384}, "config.json implies"),
    ],
)
def test_config_that_does_not_fit(saved: Saved, tmp_path: Path, change: dict[str, object], message: str) -> None:
    for file in saved("llama").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ModelError, match=message):
        load_last_block(tmp_path)


def test_model_without_linears_is_refused(tmp_path: Path) -> None:
    GPT2Config(n_embd=64, n_layer=2, n_head=2, vocab_size=64).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="0 lists of num_hidden_layers blocks"):
        Decoder.dry(str(tmp_path))


def test_stacked_experts_are_refused(tmp_path: Path) -> None:
    Qwen3MoeConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, num_experts=4, vocab_size=64
    ).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"model\.layers\.0\.mlp\..* outside nn\.Linear"):
        Decoder.dry(str(tmp_path))


def test_missing_tokenizer_is_named(saved: Saved) -> None:
    with pytest.raises(ModelError, match="no usable tokenizer"):
        _ = Decoder.open(str(saved("llama"))).tokenizer
