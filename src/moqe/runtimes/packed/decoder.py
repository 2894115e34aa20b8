"""A decoder of Llama's kind as few operations as possible: for one token, calling them takes as long as the products.

    h += out(attention(rope(qkv(norm(h)))))
    h += down(silu(gate(norm(h))) * up(norm(h)))

Linears with the same input are one. The rows of queries and keys are in another order than transformers': the two
halves of a head, which its rotation combines, alternate, so that rotating is multiplying complex numbers. Values lie in
the same tensor and are multiplied by one, queries by the scale of attention too. The residual stream, norms, rotation,
softmax and the cache are float32; products are what the linears make of them.

Runs Llama, Qwen2, Qwen3 and Mistral without sliding windows: `require_supported` says what else it cannot.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from moqe.errors import ModelError
from moqe.runtimes.packed.cache import KeyValueCache, append

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
_ROTATIONS = ("default", "linear", "llama3", "yarn")  # those whose angles do not depend on the length of the text

_LINEARS = ("qkv", "out", "gate_up", "down")

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


class Decoder:
    """Blocks, the final norm, and the rotation's angles.

    rotary: transformers' module that makes cosines and sines. dtype: of attention over many tokens. compiled: steps
    run in code that torch.compile makes as soon as kernels are chosen for as many rows; see `compiled_step`.
    """

    def __init__(
        self,
        shape: Shape,
        blocks: Sequence[Block],
        norm: Tensor,
        rotary: nn.Module,
        dtype: torch.dtype,
        compiled: bool = False,
    ) -> None:
        self.shape, self.blocks, self.norm, self._rotary, self._dtype = shape, tuple(blocks), norm, rotary, dtype
        self._turns = self._make_turns(1)
        self._compiled = compiled
        self._settled: dict[tuple[int, int], tuple[Block, ...]] = {}

    def cache(self, batch: int, size: int) -> KeyValueCache:
        """An empty cache for `batch` rows of at most `size` tokens."""
        shape = self.shape
        return KeyValueCache(len(self.blocks), batch, shape.kv_heads, size, shape.head_dim, self.norm.device)

    def prefill(self, hidden: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """Normalised hidden states of whole texts, (b, t, hidden), from their embeddings, float32 (b, t, hidden).

        A text sees itself up to each position; what stands right of a shorter one does no harm. With `cache`, keys and
        values are stored there; its lengths are left to the caller.
        """
        batch, tokens = hidden.shape[:2]
        h = hidden.reshape(batch * tokens, -1).clone()
        turns = self._turns_to(tokens)[:tokens].repeat(batch, 1, 1, 1)
        for index, block in enumerate(self.blocks):
            heads = heads_of(block, self.shape, h, turns).view(batch, tokens, -1, self.shape.head_dim).transpose(1, 2)
            queries, keys, values = torch.split(heads, self._parts(), 1)
            if cache is not None:
                cache.fill(index, torch.stack((keys, values)))
            queries, keys, values = (part.to(self._dtype) for part in (queries, keys, values))
            attended = nn.functional.scaled_dot_product_attention(
                queries, keys, values, is_causal=True, scale=1.0, enable_gqa=True
            )
            finish(block, self.shape, h, attended.transpose(1, 2).reshape(batch * tokens, -1))
        return normed(h, self.norm, self.shape.epsilon).view(batch, tokens, -1)

    def step(self, hidden: Tensor, cache: KeyValueCache) -> Tensor:
        """Normalised hidden states, (b, hidden), of one more token a row, from embeddings, float32 (b, hidden)."""
        h, turns = hidden.clone(), self._turns_to(cache.size)[cache.lengths]
        cache.step()
        mask = cache.mask()
        settled = self._settled_blocks(len(hidden)) if self._compiled else ()
        run = compiled_step() if settled else step_block
        for block, stored in zip(settled or self.blocks, cache.blocks, strict=True):
            run(block, self.shape, h, turns, stored, cache.longest, None if cache.even else cache.lengths, mask)
        return normed(h, self.norm, self.shape.epsilon)

    def _parts(self) -> list[int]:
        return [self.shape.heads, self.shape.kv_heads, self.shape.kv_heads]

    def _settled_blocks(self, rows: int) -> tuple[Block, ...]:
        """Blocks whose linears no longer choose a kernel; none before all of them have run with so many rows."""
        key = (rows, torch.get_num_threads())
        if key not in self._settled:
            found = []
            for block in self.blocks:
                linears = {name: getattr(block, name).settled(rows, self.norm.device) for name in _LINEARS}
                if None in linears.values():
                    return ()
                found.append(replace(block, **linears))
            self._settled[key] = tuple(found)
        return self._settled[key]

    def _turns_to(self, size: int) -> Tensor:
        """Factors of at least `size` positions: complex numbers as pairs, (positions, heads, head_dim / 2, 2)."""
        if len(self._turns) < size:
            self._turns = self._make_turns(size)
        return self._turns

    def _make_turns(self, size: int) -> Tensor:
        shape, device = self.shape, self.norm.device
        positions = torch.arange(size, device=device)[None]
        cosine, sine = self._rotary(torch.zeros(1, device=device), positions)  # (1, positions, head_dim) each
        half = shape.head_dim // 2
        angle = torch.complex(cosine[0, :, :half].float(), sine[0, :, :half].float())[:, None]
        factors = [angle / math.sqrt(shape.head_dim), angle, torch.ones_like(angle)]
        turns = torch.cat([f.expand(-1, n, -1) for f, n in zip(factors, self._parts(), strict=True)], 1)
        return torch.view_as_real(turns).contiguous()


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


def require_supported(config: Any) -> None:
    """Raise ModelError for a model that this decoder would not run as transformers does."""
    kind = str(config.model_type)
    rotation = str((getattr(config, "rope_parameters", None) or {}).get("rope_type", "default"))
    windows = "sliding_attention" in (getattr(config, "layer_types", None) or ())
    windows |= kind == "mistral" and getattr(config, "sliding_window", None) is not None
    problems = {
        f"its architecture is {kind}, and not one of {', '.join(ARCHITECTURES)}": kind not in ARCHITECTURES,
        f"its activation is {getattr(config, 'hidden_act', None)}": getattr(config, "hidden_act", None) != "silu",
        f"its rotation is of type {rotation}": rotation not in _ROTATIONS,
        "its attention has sliding windows": windows,
    }
    found = [problem for problem, is_so in problems.items() if is_so]
    if found:
        raise ModelError(f"the packed runtime cannot run this model: {'; '.join(found)}. Use the reference runtime")
