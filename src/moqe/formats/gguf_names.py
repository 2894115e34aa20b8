"""Parameter names and row orders: Hugging Face on one side, GGUF on the other.

Specification: ggml's docs/gguf.md, "Standardized tensor names". Rotary embedding pairs channel `j` of a head with
channel `j + d/2` in Hugging Face's models. llama.cpp does the same for Qwen, but in its `llama` architecture pairs
channels `2j` and `2j + 1`, so there the rows of the query and key projections (and of their biases) come in another
order within each head. ggml's block types never mix rows: reordering packed rows is exact.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from moqe.errors import ModelError

_IN_BLOCK = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_AROUND = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
ROPE_FACTORS = "rope_freqs.weight"  # derived from the config, so no parameter of the base model

_OUT_BLOCK = {theirs: ours for ours, theirs in _IN_BLOCK.items()}
_OUT_AROUND = {theirs: ours for ours, theirs in _AROUND.items()}


def to_gguf(name: str) -> str:
    """The GGUF name of a Hugging Face parameter. Raises ModelError when GGUF has none."""
    if name in _AROUND:
        return _AROUND[name]
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
    if match is None or match[2] not in _IN_BLOCK:
        raise ModelError(f"parameter {name} has no name in GGUF: use an integer scheme such as w4a16 for this model")
    return f"blk.{match[1]}.{_IN_BLOCK[match[2]]}.{match[3]}"


def from_gguf(name: str) -> str | None:
    """The Hugging Face parameter that a GGUF tensor holds, or None when it holds none."""
    if name in _OUT_AROUND:
        return _OUT_AROUND[name]
    match = re.fullmatch(r"blk\.(\d+)\.(.+)\.(weight|bias)", name)
    if match is None or match[2] not in _OUT_BLOCK:
        return None
    return f"model.layers.{match[1]}.{_OUT_BLOCK[match[2]]}.{match[3]}"


@dataclass(frozen=True)
class RowOrder:
    """Row order of the query and key projections; `interleaved` is the `llama` architecture's."""

    interleaved: bool
    heads: int
    key_value_heads: int

    def gguf_rows(self, name: str, rows: int) -> Tensor | None:
        """Indices `i` with `gguf = hugging_face[i]` for parameter `name` (Hugging Face's); None when they agree."""
        projection = re.fullmatch(r"model\.layers\.\d+\.self_attn\.([qk])_proj\.(weight|bias)", name)
        if not self.interleaved or projection is None:
            return None
        heads = self.heads if projection[1] == "q" else self.key_value_heads
        return torch.arange(rows).view(heads, 2, -1).transpose(1, 2).reshape(-1)  # (head, half, j) -> (head, j, half)

    def hugging_face_rows(self, name: str, rows: int) -> Tensor | None:
        """Indices `i` with `hugging_face = gguf[i]`: the inverse of `gguf_rows`."""
        order = self.gguf_rows(name, rows)
        return None if order is None else torch.argsort(order)
