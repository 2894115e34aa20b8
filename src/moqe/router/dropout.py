"""Dropout whose masks are cheap on a CPU, and attention with it.

torch draws every number of a dropout mask one after the other, from a generator that takes 7 ns for it, whatever the
number of threads: a third of a training step of the paper's text router. Here an element costs 16 random bits, a
quarter of what the same generator yields in one go, so that the rate is a multiple of 2^-16 (0.1 becomes 0.1000061) and
what is kept is scaled by exactly that. Elsewhere than on a CPU dropout is torch's.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

_LEVELS = 1 << 16


def dropout(x: Tensor, rate: float, training: bool) -> Tensor:
    """Elements are zeroed with probability `rate`, 0 to below 1, and the others scaled so that the mean is kept.

    Any shape; x itself where not `training` or `rate` rounds to 0. Random numbers are the global generator's.
    """
    dropped = min(round(rate * _LEVELS), _LEVELS - 1)
    if not training or not dropped:
        return x
    if x.device.type != "cpu":
        return functional.dropout(x, rate)
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)  # 64 each
    kept = bits.view(torch.int16)[: x.numel()].view(x.shape) >= dropped - _LEVELS // 2
    return x * kept * (_LEVELS / (_LEVELS - dropped))


def attention(query: Tensor, key: Tensor, value: Tensor, rate: float, training: bool) -> Tensor:
    """Attention of every head, (b, heads, t, d / heads), of three such, with dropout on its weights in training."""
    if not training or not rate or query.device.type != "cpu":
        return functional.scaled_dot_product_attention(query, key, value, dropout_p=rate if training else 0.0)
    weights = (query / math.sqrt(query.shape[-1]) @ key.transpose(-1, -2)).softmax(-1)  # (b, heads, t, t)
    return dropout(weights, rate, training).to(value.dtype) @ value
