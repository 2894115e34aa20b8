"""A causal LM without its weights: modules in place, parameters on the meta device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moqe.errors import ModelError
from moqe.models.valueless import Valueless


def build_skeleton(folder: Path, dtype: torch.dtype) -> nn.Module:
    """The causal LM that a folder's config describes: parameters on the meta device, computed buffers real.

    Raises ModelError when transformers knows no causal LM for the config.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder)
        with Valueless():
            model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except (ValueError, KeyError, TypeError, OSError, ImportError) as error:
        reason = str(error).strip().splitlines()
        raise ModelError(
            f"{folder} is not a causal language model that this transformers can build "
            f"({reason[0] if reason else type(error).__name__}): check model_type in its config.json"
        ) from error
    for module in model.modules():
        release(module, recurse=False)
    return model.eval()


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The list of decoder blocks and its name: the one ModuleList as long as the config says, holding linears.

    Raises ModelError when there is none, or more than one, or when blocks keep matrices that are not nn.Linear, such as
    stacked experts: they would stay in full precision without a word.
    """
    config: Any = model.config
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == getattr(config, "num_hidden_layers", None)
        and all(any(isinstance(inner, nn.Linear) for inner in block.modules()) for block in module)
    ]
    if len(found) != 1:
        raise ModelError(
            f"{type(model).__name__} has {len(found)} lists of num_hidden_layers blocks with linears, one is needed: "
            "MoQE walks decoders such as Llama, Qwen2, Qwen3 and Mistral; choose one of these families as base"
        )
    prefix, blocks = found[0]
    for name, parameter in blocks.named_parameters():
        if parameter.dim() > 1 and not isinstance(blocks.get_submodule(name.rpartition(".")[0]), nn.Linear):
            raise ModelError(
                f"{prefix}.{name} is a matrix outside nn.Linear, which MoQE cannot quantize: choose a dense decoder, "
                "such as Llama, Qwen2, Qwen3 or Mistral, as base"
            )
    return prefix, blocks


def assign(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Put `tensor` in the place of the parameter or buffer `name`, relative to `module`."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if leaf in owner._buffers:
        owner._buffers[leaf] = tensor
    else:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)


def release(module: nn.Module, recurse: bool = True) -> None:
    """Move a module's parameters to the meta device: their memory is free once nobody else holds it."""
    for name, parameter in list(module.named_parameters(recurse=recurse, remove_duplicate=False)):
        if not parameter.is_meta:
            assign(module, name, torch.empty_like(parameter, device="meta"))
