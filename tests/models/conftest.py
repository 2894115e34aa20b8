"""Two-layer decoders with random weights, saved as transformers saves them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPTNeoConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

SIZES = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 128,
}
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SIZES),
    "qwen2": lambda: Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=8, max_window_layers=1),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=32, tie_word_embeddings=True),
    "mistral": lambda: MistralConfig(**SIZES, sliding_window=8),
    "gemma": lambda: GemmaConfig(**SIZES, head_dim=64),
    "opt": lambda: OPTConfig(
        hidden_size=256,
        ffn_dim=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=512,
        word_embed_proj_dim=256,
        max_position_embeddings=128,
    ),
    "gpt_neo": lambda: GPTNeoConfig(
        hidden_size=256,
        num_layers=2,
        attention_types=[[["global", "local"], 1]],
        num_heads=4,
        vocab_size=512,
        window_size=8,
        max_position_embeddings=128,
    ),
}


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a model by architecture, made once. Norms and biases are far from their initial 1 and 0."""
    folders: dict[str, Path] = {}

    def make(architecture: str) -> Path:
        if architecture not in folders:
            torch.manual_seed(7)
            model = AutoModelForCausalLM.from_config(CONFIGS[architecture]())
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.dim() == 1:
                        parameter.add_(torch.randn_like(parameter) * 0.2)
                    else:
                        parameter.mul_(3)
            folders[architecture] = tmp_path_factory.mktemp(architecture)
            model.save_pretrained(folders[architecture])
        return folders[architecture]

    return make
