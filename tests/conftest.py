"""Test settings: one thread per test process, no network, fixed seeds; and a tiny base model with its texts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch

SHORT = {"steps": 6, "learning_rate": 0.005, "evaluate_every": 2}  # distillation that tests can wait for
WORDS = {
    "code": ("def", "return", "self", "value", "for", "in", "range", "print", "if", "else", "import", "list", "dict"),
    "prose": ("the", "a", "river", "house", "walked", "slowly", "into", "old", "green", "morning", "and", "never"),
    "numbers": ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "plus", "minus"),
}


torch.set_num_threads(1)  # several test processes share the machine, and one thread sums in one order


@pytest.fixture(autouse=True)
def _deterministic() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    torch.set_num_threads(1)  # a test that changed it must not change the next one's sums


def write_texts(folder: Path, documents: int = 12, words: int = 160) -> None:
    """Text files `<domain>-<part>.jsonl` of random words, one document a line; parts are disjoint."""
    import json
    import random

    for domain, vocabulary in WORDS.items():
        for part in ("calibration", "router", "test"):
            source = random.Random(f"{domain}-{part}")
            lines = [" ".join(source.choices(vocabulary, k=words)) for _ in range(documents)]
            text = "".join(json.dumps({"text": line}) + "\n" for line in lines)
            (folder / f"{domain}-{part}.jsonl").write_text(text)


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of text files in three domains."""
    folder = tmp_path_factory.mktemp("texts")
    write_texts(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3 with two blocks of hidden size 256, random but for its sharpened logits, and a tokenizer."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    from tokenizers.decoders import ByteLevel
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    folder = tmp_path_factory.mktemp("base")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # Qwen2's rule, which GGUF files can name
        [
            pre_tokenizers.Split(
                Regex(
                    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
                ),
                "isolated",
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([" ".join(words) for words in WORDS.values()] * 50, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    torch.manual_seed(1)
    config = Qwen3Config(
        vocab_size=len(fast),
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        eos_token_id=fast.eos_token_id,
        bos_token_id=None,
        pad_token_id=fast.eos_token_id,
    )
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(8)
    model.to(torch.bfloat16).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def loud_base(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base with softer logits and louder blocks, so that quantization changes what it says."""
    import shutil

    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("loud") / "base"
    shutil.copytree(tiny_base, folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(0.5)
        for name, parameter in model.model.layers.named_parameters():
            if name.endswith("proj.weight"):
                parameter.mul_(6)
    model.save_pretrained(folder)
    return folder


def recipe_for(base: Path, texts: Path) -> dict[str, Any]:
    """A recipe for a base model and text files, as the mapping a YAML file would hold."""

    def sources(part: str) -> list[dict[str, str]]:
        return [{"path": str(texts / f"{domain}-{part}.jsonl"), "domain": domain} for domain in WORDS]

    return {
        "base": str(base),
        "data": {
            "calibration": sources("calibration"),
            "router": sources("router"),
            "test": sources("test"),
            "window": 48,
            "calibration_samples": 12,
            "router_samples": 48,
            "test_samples": 36,
        },
        "experts": [
            {"name": "gptq", "method": "gptq", "scheme": "w4a16", "group_size": 64},
            {"name": "rtn", "method": "rtn", "scheme": "w3a16", "group_size": 64},
            {"name": "smooth", "method": "smoothquant", "scheme": "w8a8"},
            {"name": "kq", "method": "kquants", "scheme": "q4_k"},
        ],
        "router": {"preset": "tuned", "epochs": 1},
        "protocol": {"route_on": "prefix", "prefix": 16},
        "bootstrap_samples": 100,
    }


def with_specialists(content: dict[str, Any], **options: Any) -> dict[str, Any]:
    """The tiny recipe with specialists beside one expert of another method."""
    experts = [{"name": "rtn", "method": "rtn", "scheme": "w4a16", "group_size": 64}]
    return content | {"experts": experts, "specialists": {"distill": SHORT} | options}


@pytest.fixture
def recipe_content(tiny_base: Path, texts: Path) -> dict[str, Any]:
    """A recipe for the tiny base; tests change what they are about."""
    return recipe_for(tiny_base, texts)


@pytest.fixture(scope="session")
def built(tiny_base: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of the tiny base. Tests must leave it as it is."""
    import moqe

    folder = tmp_path_factory.mktemp("mixture") / "m"
    moqe.build(moqe.parse_recipe(recipe_for(tiny_base, texts)), folder)
    return folder


@pytest.fixture(scope="session")
def special(loud_base: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of rtn, a generalist and three specialists. Tests must leave it as it is."""
    import moqe

    folder = tmp_path_factory.mktemp("special") / "m"
    moqe.build(moqe.parse_recipe(with_specialists(recipe_for(loud_base, texts))), folder)
    return folder
