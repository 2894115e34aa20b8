"""What llama.cpp's CPU kernels do to the input of a matrix product, so that the reference runtime can do the same.

ggml multiplies integers: the weights' type decides to what the other factor is rounded first (`vec_dot_type` in ggml's
type table). Block-32 types round it to Q8_0, blocks of 32 with scale max |x| / 127 in float16; K-quants to Q8_K, blocks
of 256 with a float32 scale; float16 and bfloat16 weights to their own type. GPU back ends round otherwise or not at
all, which is why losses are measured without any of it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moqe.formats.expert_files import ExpertFiles
from moqe.quantized import BlockTensor


def q8_0(inputs: Tensor) -> Tensor:
    """Inputs, (..., in), rounded to blocks of 32 eight-bit integers with a float16 scale."""
    blocks = inputs.float().reshape(*inputs.shape[:-1], -1, 32)
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    codes = torch.where(scale > 0, blocks / scale, 0.0).round()
    return (codes * scale.half().float()).reshape(inputs.shape)


def q8_k(inputs: Tensor) -> Tensor:
    """Inputs, (..., in), rounded to blocks of 256 eight-bit integers whose largest magnitude becomes -127."""
    blocks = inputs.float().reshape(*inputs.shape[:-1], -1, 256)
    largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    scale = -largest / 127
    codes = torch.where(scale != 0, blocks / scale, 0.0).round().clamp(max=127)
    return (codes * scale).reshape(inputs.shape)


def _as_type(kind: torch.dtype, inputs: Tensor) -> Tensor:
    return inputs.to(kind).float()


def _round_input(rounding: Any, module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (rounding(inputs[0]), *inputs[1:])


def round_inputs_as_ggml(model: nn.Module, expert: ExpertFiles, head: nn.Module, head_type: torch.dtype) -> None:
    """Make the linears of a runtime's model round their inputs as ggml does for the expert's weight types."""
    modules = dict(model.named_modules())
    for name in expert.names():
        value = expert.load(name)
        if isinstance(value, BlockTensor):
            rounding = q8_0 if value.scheme.block_size == 32 else q8_k
            modules[name.removesuffix(".weight")].register_forward_pre_hook(partial(_round_input, rounding))
    if head_type in (torch.float16, torch.bfloat16):
        head.register_forward_pre_hook(partial(_round_input, partial(_as_type, head_type)))
