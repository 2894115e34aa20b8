"""A decoder of Llama's kind on the blocks of `moqe.runtimes.packed.block`: whole texts, and steps of one token a row.

Runs Llama, Qwen2, Qwen3 and Mistral without sliding windows: `require_supported` says what else it cannot.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from moqe.errors import ModelError
from moqe.runtimes.packed.block import Block, Shape, compiled_step, finish, heads_of, normed, step_block
from moqe.runtimes.packed.cache import KeyValueCache

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
_ROTATIONS = ("default", "linear", "llama3", "yarn")  # those whose angles do not depend on the length of the text
_LINEARS = ("qkv", "out", "gate_up", "down")


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
