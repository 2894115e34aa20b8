"""Dynamic quantization of a linear's input, one scale per token: what w8a8 and w4a8 do to activations.

As compressed-tensors does it (version 0.20, checked in the tests): symmetric, scale = max |x| of the token divided by
half of the code range (127.5 for 8 bits), rounding half to even, codes clamped to [-128, 127]. Tokens that are all zero
get a tiny scale. vLLM's CUDA kernels divide by 127 instead; the two differ by 0.4 % of a step.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


def quantize_activations(inputs: Tensor, bits: int) -> Tensor:
    """Inputs, (..., in), rounded to `bits`-bit integers times one scale per token, in their own type."""
    half = 1 << (bits - 1)
    scale = inputs.abs().amax(-1, keepdim=True) / (half - 0.5)
    scale = torch.where(scale == 0, torch.finfo(scale.dtype).eps, scale)
    return torch.clamp(inputs / scale, -half, half - 1).round() * scale


def quantize_inputs(linear: nn.Module, bits: int) -> RemovableHandle:
    """Make a linear round its inputs to `bits` bits, as `quantize_activations` does, until the handle is removed."""
    return linear.register_forward_pre_hook(partial(_rounded, bits))


def _rounded(bits: int, _linear: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (quantize_activations(inputs[0], bits), *inputs[1:])
