"""What all experts of a mixture share, opened from the mixture's own folder: no base model is needed to run one.

`shared/` holds the base model's config, its tokenizer and the tensors outside the decoder blocks. The blocks stay on
the meta device; a runtime fills them with an expert's parameters.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from moqe.errors import CheckpointError
from moqe.models.device import check_device
from moqe.models.skeleton import assign, build_skeleton


@dataclass(frozen=True)
class SharedParts:
    """The model around the blocks.

    model: the causal LM, its blocks on the meta device. tokenizer: transformers' own. embedding: the input
    embedding, (vocabulary, hidden). stop_tokens: ids that end a generation.
    """

    model: nn.Module
    tokenizer: Any
    embedding: Tensor
    stop_tokens: tuple[int, ...]


def open_shared(folder: Path, tensors: Path, device: str = "cpu") -> SharedParts:
    """Open a mixture's shared folder; `tensors` is its safetensors file.

    Raises CheckpointError when something is missing or damaged.
    """
    from transformers import AutoTokenizer, GenerationConfig

    check_device(device)
    try:
        stored = load_file(tensors)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model: Any = build_skeleton(folder, torch.float32)
        stated = (folder / "generation_config.json").exists()
        generation = GenerationConfig.from_pretrained(folder) if stated else GenerationConfig()
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{folder} is missing or damaged ({error}): build or copy the mixture again") from error
    for name, tensor in stored.items():
        assign(model, name, tensor.to(device, torch.float32))
    for name, buffer in list(model.named_buffers()):
        assign(model, name, buffer.to(device))
    if model.config.tie_word_embeddings:
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
    return SharedParts(
        model, tokenizer, model.get_input_embeddings().weight.detach(), _stop_tokens(model, tokenizer, generation)
    )


def share(model: nn.Module) -> nn.Module:
    """A copy of a model's modules that holds the very same parameters and buffers, in evaluation mode."""
    memo: dict[int, Any] = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, memo).eval()


def _stop_tokens(model: Any, tokenizer: Any, generation: Any) -> tuple[int, ...]:
    """The end-of-text ids of the tokenizer, the config and the generation config."""
    ids = [tokenizer.eos_token_id, model.config.eos_token_id, generation.eos_token_id]
    flat = [i for entry in ids for i in (entry if isinstance(entry, list) else [entry]) if i is not None]
    return tuple(sorted(set(flat)))
