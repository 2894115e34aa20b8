"""What llama.cpp must know about an architecture: hyperparameters as GGUF metadata.

Specification: ggml's docs/gguf.md and the loaders in llama.cpp's src/models. The `llama` architecture has no sliding
window in llama.cpp, and neither have `qwen2` and `qwen3`: a model with one is exact up to the window and wrong after
it, so the window becomes the file's context length. Position encodings: plain, linear, yarn (with its default
attention factor) and llama3, whose per-channel factors are a tensor. What cannot be said in GGUF is a ModelError.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from gguf import LlamaFileType
from torch import Tensor

from moqe.errors import ModelError
from moqe.formats.gguf_container import Value, float32, string, uint32
from moqe.formats.gguf_names import RowOrder

ARCHITECTURES: dict[str, str] = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
INTERLEAVED = frozenset({"llama"})  # GGUF architectures with their own row order of queries and keys

_FILE_TYPES: dict[str, LlamaFileType] = {
    "F32": LlamaFileType.ALL_F32,
    "F16": LlamaFileType.MOSTLY_F16,
    "BF16": LlamaFileType.MOSTLY_BF16,
    "Q2_K": LlamaFileType.MOSTLY_Q2_K,
    "Q3_K": LlamaFileType.MOSTLY_Q3_K_S,
    "Q4_K": LlamaFileType.MOSTLY_Q4_K_S,
    "Q5_K": LlamaFileType.MOSTLY_Q5_K_S,
    "Q6_K": LlamaFileType.MOSTLY_Q6_K,
    "Q4_0": LlamaFileType.MOSTLY_Q4_0,
    "Q4_1": LlamaFileType.MOSTLY_Q4_1,
    "Q5_0": LlamaFileType.MOSTLY_Q5_0,
    "Q5_1": LlamaFileType.MOSTLY_Q5_1,
    "Q8_0": LlamaFileType.MOSTLY_Q8_0,
}


def architecture(config: Any) -> str:
    """GGUF's name of a Hugging Face config's architecture. Raises ModelError when it is not supported."""
    name = ARCHITECTURES.get(config.model_type)
    if name is None:
        raise ModelError(
            f"GGUF files are written for {', '.join(ARCHITECTURES)} models and this one is {config.model_type}: "
            "use an integer scheme such as w4a16"
        )
    if config.hidden_act != "silu":
        raise ModelError(f"llama.cpp's {name} models use the activation silu and this one {config.hidden_act}")
    return name


def row_order(config: Any) -> RowOrder:
    """Row order of queries and keys in the GGUF file of a Hugging Face config."""
    return RowOrder(architecture(config) in INTERLEAVED, config.num_attention_heads, config.num_key_value_heads)


def architecture_metadata(config: Any, kind: str) -> dict[str, Value]:
    """The `general.*` and `<architecture>.*` metadata of a model most of whose matrices have ggml's type `kind`."""
    name = architecture(config)
    head = _head_size(config)
    context = config.max_position_embeddings
    window = _sliding_window(config)
    return {
        "general.architecture": string(name),
        "general.type": string("model"),
        "general.quantization_version": uint32(2),
        "general.file_type": uint32(int(_FILE_TYPES[kind])),
        f"{name}.context_length": uint32(min(context, window) if window else context),
        f"{name}.embedding_length": uint32(config.hidden_size),
        f"{name}.block_count": uint32(config.num_hidden_layers),
        f"{name}.feed_forward_length": uint32(config.intermediate_size),
        f"{name}.attention.head_count": uint32(config.num_attention_heads),
        f"{name}.attention.head_count_kv": uint32(config.num_key_value_heads),
        f"{name}.attention.key_length": uint32(head),
        f"{name}.attention.value_length": uint32(head),
        f"{name}.attention.layer_norm_rms_epsilon": float32(config.rms_norm_eps),
        f"{name}.vocab_size": uint32(config.vocab_size),
        f"{name}.rope.dimension_count": uint32(head),
        **_rope_metadata(name, config),
    }


def rope_factors(config: Any) -> Tensor | None:
    """What llama3's scaling divides each rotary frequency by: float32, (head size / 2,); None for other scalings.

    Frequencies whose wavelength is short against the original context stay, long ones are divided by `factor`, those
    between are interpolated (Llama 3.1's release notes; transformers' `rope_type: llama3`).
    """
    rope = config.rope_parameters
    if rope.get("rope_type", "default") != "llama3":
        return None
    size = _head_size(config)
    frequencies = rope["rope_theta"] ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)  # over the original context
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    factors: Tensor = 1.0 / (kept + (1.0 - kept) / rope["factor"])
    return factors.to(torch.float32)


def _head_size(config: Any) -> int:
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(size)


def _sliding_window(config: Any) -> int:
    """Tokens a layer attends to, or 0 when every layer attends to all."""
    window = getattr(config, "sliding_window", None)
    if not window or getattr(config, "use_sliding_window", True) is False:
        return 0
    return int(window)


def _rope_metadata(name: str, config: Any) -> dict[str, Value]:
    rope = config.rope_parameters
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ModelError(f"llama.cpp's {name} models rotate whole heads, and this one only a part of each")
    metadata = {f"{name}.rope.freq_base": float32(rope["rope_theta"])}
    kind = rope.get("rope_type", "default")
    if kind in ("default", "llama3"):
        return metadata
    unusual = {
        key: rope[key]
        for key, usual in (("attention_factor", None), ("mscale", None), ("mscale_all_dim", None), ("truncate", True))
        if rope.get(key, usual) not in (usual, None)
    }
    if kind not in ("linear", "yarn") or unusual:
        raise ModelError(f"position encoding {kind} {unusual or ''} cannot be written to GGUF: use an integer scheme")
    metadata |= {f"{name}.rope.scaling.type": string(kind), f"{name}.rope.scaling.factor": float32(rope["factor"])}
    if kind == "yarn":
        original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        metadata |= {
            f"{name}.rope.scaling.original_context_length": uint32(original),
            f"{name}.rope.scaling.yarn_beta_fast": float32(rope.get("beta_fast") or 32.0),
            f"{name}.rope.scaling.yarn_beta_slow": float32(rope.get("beta_slow") or 1.0),
        }
    return metadata
