"""Tiny random models with tokenizers, GGUF experts made of them by plain rounding, and llama.cpp in this process."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import xllamacpp
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from moqe.formats.ggml_blocks import BLOCK_SCHEMES, unpack
from moqe.formats.gguf_writer import GgufWriter
from moqe.quantized import Quantized
from moqe.schemes import scheme

QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXT = [
    "The quick brown fox jumps over the lazy dog, and it's 12345 o'clock again.\n\nWe'll see what they've done.",
    "def area(width, height):\n    return width * height  # no units\n",
    "Größe, naïveté, 東京 and Ελλάδα: every byte must find a token.",
] * 20


def train_tokenizer(folder: Path, cutting: pre_tokenizers.PreTokenizer, vocabulary: int = 500, **model: Any) -> None:
    """Train a byte-level BPE on a few lines and save it as transformers does."""
    tokenizer = Tokenizer(models.BPE(**model))
    tokenizer.pre_tokenizer = cutting
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(folder)


@pytest.fixture
def save_tokenizer() -> Callable[..., None]:
    """`train_tokenizer`."""
    return train_tokenizer


def qwen_cutting() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


@pytest.fixture
def make_base(tmp_path: Path) -> Callable[..., Path]:
    """A random two-block model of a family, with a tokenizer, saved as safetensors."""

    def make(family: str, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
        folder = tmp_path / f"base-{family}"
        config = AutoConfig.for_model(
            family,
            hidden_size=256,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            vocab_size=512,
            max_position_embeddings=options.pop("context", 512),
            eos_token_id=0,
            bos_token_id=None,
            pad_token_id=None,
            initializer_range=0.1,
            **options,
        )
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.data += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(folder)
        train_tokenizer(folder, qwen_cutting())
        return folder

    return make


def round_weights(weight: Tensor, block: str) -> Quantized | Tensor:
    """A matrix in a block type by the gguf package's own rounding; "" keeps it."""
    if not block or weight.dim() == 1:
        return weight
    raw = gguf.quants.quantize(weight.float().numpy(), gguf.GGMLQuantizationType[block])
    return unpack(torch.from_numpy(raw), BLOCK_SCHEMES[block])


@pytest.fixture
def make_expert(tmp_path: Path) -> Callable[..., Path]:
    """Write a base model as GGUF with all linears in block type `block`; "" keeps full precision."""

    def make(base: Path, block: str = "", name: str = "expert") -> Path:
        folder = tmp_path / name
        weights = load_file(base / "model.safetensors")
        writer = GgufWriter(
            folder, base, tmp_path / "shared", scheme(block.lower() or "q8_0"), 2, tmp_path / "work" / name
        )
        for index in range(2):
            mine = {key: value for key, value in weights.items() if f".layers.{index}." in key}
            writer.write(index, {key: round_weights(value, block) for key, value in mine.items()})
        writer.finish()
        return folder

    return make


@dataclass
class Llama:
    """llama.cpp on one GGUF file, as exact as it can be: float32 cache, no flash attention, no reuse of prompts."""

    path: Path

    def __post_init__(self) -> None:
        params = xllamacpp.CommonParams()
        params.model.path = str(self.path)
        params.n_ctx, params.n_parallel, params.warmup, params.verbosity = 512, 1, False, 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._server = xllamacpp.Server(params)

    def greedy(self, tokens: list[int], count: int, banned: list[int] | None = None) -> tuple[list[int], list[float]]:
        """The next `count` tokens, and the log-probabilities of those that are whole characters, before any ban."""
        answer = self._post(
            "completion",
            {
                "prompt": tokens,
                "n_predict": count,
                "temperature": 0,
                "n_probs": 1,
                "return_tokens": True,
                "cache_prompt": False,
                "ignore_eos": True,
                "logit_bias": [[token, False] for token in banned or []],
            },
        )
        return answer["tokens"], [step["logprob"] for step in answer["completion_probabilities"]]

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text, with whatever the file says is added to every text."""
        tokens: list[int] = self._post("tokenize", {"content": text, "add_special": True})["tokens"]
        return tokens

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        url = f"{self._server.listening_address}/{path}"
        request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)


@pytest.fixture
def llama() -> Callable[[Path], Llama]:
    """Open a GGUF file, or the first file of a folder, in llama.cpp."""
    return lambda path: Llama(path if path.is_file() else min(path.glob("*.gguf")))
