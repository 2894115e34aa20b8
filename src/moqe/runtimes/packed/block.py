"""A block of Llama's kind in as few operations as possible: for one token, calling them takes as long as the products.

    h += out(attention(rope(qkv(norm(h)))))
    h += down(silu(gate(norm(h))) * up(norm(h)))

Linears with the same input are one. The rows of queries and keys are in another order than transformers': the two
halves of a head, which its rotation combines, alternate, so that rotating is multiplying complex numbers. Values lie in
the same tensor and are multiplied by one, queries by the scale of attention too. The residual stream, norms, rotation,
softmax and the cache are float32; products are what the linears make of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from moqe.runtimes.packed.cache import append

Linear = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Block:
    """One block. Linears take (rows, in) and give (rows, out); norms are float32.

    qkv: queries, keys and values one after the other, rows in the order of `rotated_order`. head_norm: (heads of
    queries and keys, head_dim) in that order, or None. gate_up: gate and up one after the other.
    """

    attention_norm: Tensor
    qkv: Linear
    head_norm: Tensor | None
    out: Linear
    mlp_norm: Tensor
    gate_up: Linear
    down: Linear


@dataclass(frozen=True)
class Shape:
    """What blocks have in common: heads of queries and of keys and values, their size, and the epsilon of norms."""

    heads: int
    kv_heads: int
    head_dim: int
    epsilon: float

    @classmethod
    def of(cls, config: Any) -> Shape:
        """From the config of transformers."""
        heads = int(config.num_attention_heads)
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        return cls(heads, int(config.num_key_value_heads), int(head_dim), float(config.rms_norm_eps))


def heads_of(block: Block, shape: Shape, h: Tensor, turns: Tensor) -> Tensor:
    """Queries, keys and values of the residual stream, (rows, hidden), rotated: float32, (rows, heads, head_dim).

    turns: of each row, as `Decoder` keeps them, (rows, heads, head_dim / 2, 2).
    """
    heads = block.qkv(normed(h, block.attention_norm, shape.epsilon)).to(torch.float32)
    heads = heads.view(len(h), -1, shape.head_dim)
    if block.head_norm is not None:
        count = shape.heads + shape.kv_heads
        heads = torch.cat([normed(heads[:, :count], block.head_norm, shape.epsilon), heads[:, count:]], 1)
    pairs = heads.view(len(h), -1, shape.head_dim // 2, 2)
    if torch.compiler.is_compiling():  # there are no complex numbers in what Inductor generates
        (real, imaginary), (cosine, sine) = pairs.unbind(-1), turns.unbind(-1)
        turned = torch.stack((real * cosine - imaginary * sine, real * sine + imaginary * cosine), -1)
    else:
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(turns))
    return turned.flatten(2)


def finish(block: Block, shape: Shape, h: Tensor, attended: Tensor) -> None:
    """Add what comes after attention, (rows, heads * head_dim), to the residual stream, (rows, hidden)."""
    h.add_(block.out(attended))
    both = block.gate_up(normed(h, block.mlp_norm, shape.epsilon))
    middle = both.shape[1] // 2
    h.add_(block.down(nn.functional.silu(both[:, :middle]).mul_(both[:, middle:])))


def normed(h: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Root mean square norm over the last dimension."""
    length = torch.linalg.vector_norm(h, 2, -1, True)
    inverse: Tensor = length.square_().div_(h.shape[-1]).add_(epsilon).rsqrt_()
    return (h * inverse).mul_(weight)


def step_block(
    block: Block,
    shape: Shape,
    h: Tensor,
    turns: Tensor,
    stored: Tensor,
    longest: int,
    lengths: Tensor | None,
    mask: Tensor | None,
) -> None:
    """One block for one more token a row, added to the residual stream, (b, hidden).

    turns: see `heads_of`. stored, longest, lengths: see `append`. mask: see `KeyValueCache.mask`.
    """
    batch, group = len(h), shape.heads // shape.kv_heads
    heads = heads_of(block, shape, h, turns)  # (b, heads, head_dim)
    entries = heads[:, shape.heads :].view(batch, 2, shape.kv_heads, shape.head_dim).transpose(0, 1)
    keys, values = append(stored, entries, longest, lengths)
    queries = heads[:, : shape.heads].reshape(batch * shape.kv_heads, group, shape.head_dim)
    scores = torch.bmm(queries, keys.transpose(1, 2))  # (b * kv_heads, group, longest)
    if mask is not None:
        scores.view(batch, shape.kv_heads, group, -1).add_(mask)
    attended = torch.bmm(torch.softmax(scores, -1), values)
    finish(block, shape, h, attended.view(batch, -1))


@cache
def compiled_step() -> Callable[..., None]:
    """`step_block` compiled: what lies between products becomes a few loops.

    That happens when it is first called, once for all blocks and experts whose shapes and kernels are the same, and
    again when texts grow or rows have other numbers. Beyond as many kinds of these as torch's `recompile_limit` says
    it runs as it is. Its loops stay in one thread; products keep all of them.
    """
    return torch.compile(step_block, options={"cpp.threads": 1})


def rotated_order(heads: int, head_dim: int) -> Tensor:
    """Which row of a query's or key's linear stands where: int64, (heads * head_dim,). Halves of heads alternate."""
    rows = torch.arange(heads * head_dim).view(heads, 2, head_dim // 2)
    return rows.transpose(1, 2).flatten()
