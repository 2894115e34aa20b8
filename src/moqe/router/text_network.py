"""The paper's text router: frozen embeddings, a small Transformer encoder, one more self-attention, a two-layer MLP.

Source: Zhang et al., MoQE (arXiv 2508.09204), the router for language models. The base model's input embeddings, which
stay frozen and outside the network, pass through two pre-norm Transformer encoder layers (4 heads, feed-forward twice
the width, GELU, dropout 0.1), a self-attention with separate query, key, value and output projections, scaled by
sqrt(d / heads), with dropout 0.1 on the attention and on its output, a LayerNorm, and an MLP d -> d/2 -> experts.

Faithful: all of that with `width=None, segment=1`. Differs, where the paper is silent: no positions are added (token
order is seen by nobody but the base model), the self-attention has a residual connection before its LayerNorm, tokens
are mean-pooled before the MLP, whose activation is GELU. Dropout's rate is rounded to a multiple of 2^-16 on a CPU, and
`paper` trains with bfloat16 products where the processor has them, unless the recipe's `precision` says otherwise: at
d = 256 and 576 with 256 tokens, half to a third of a step's time without either.
Not the paper's, for `tuned`: `width` puts a linear map d -> width in front, and `segment` averages runs of that many
tokens into one vector, which together cut the cost a hundredfold and the parameters to what a few hundred samples
can train.
Cost: about 20 d^2 multiplications per token forward, 3x that in training, and attention quadratic in the tokens; at
d = 576 that is 7 million parameters and 2 thousand training tokens per second and core.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from moqe.errors import RecipeError
from moqe.router.dropout import attention, dropout


class RoutingNetwork(nn.Module):
    """A network from a batch of features to logits, (b, experts), higher for better experts.

    `kind` names the class in saved files; `options` are the constructor's arguments, enough to build it again.
    """

    kind: ClassVar[str]
    options: dict[str, int | float | None]


class SelfAttention(nn.Module):
    """Multi-head self-attention with separate projections and dropout on attention and output."""

    def __init__(self, dimension: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query = nn.Linear(dimension, dimension)
        self.key = nn.Linear(dimension, dimension)
        self.value = nn.Linear(dimension, dimension)
        self.projection = nn.Linear(dimension, dimension)

    def forward(self, x: Tensor) -> Tensor:
        """(b, t, dimension) -> (b, t, dimension)."""
        query, key, value = (
            split_heads(projection(x), self.heads) for projection in (self.query, self.key, self.value)
        )
        mixed = attention(query, key, value, self.dropout, self.training)  # (b, heads, t, d/heads)
        return dropout(self.projection(mixed.transpose(1, 2).flatten(2)), self.dropout, self.training)


class EncoderLayer(nn.TransformerEncoderLayer):
    """torch's pre-norm layer with GELU, which in training draws its dropout masks as `moqe.router.dropout` does."""

    def __init__(self, dimension: int, heads: int, dropout: float) -> None:
        super().__init__(dimension, heads, 2 * dimension, dropout, activation="gelu", batch_first=True, norm_first=True)
        self.rate = dropout

    def forward(self, src: Tensor) -> Tensor:  # type: ignore[override]  # there is nothing to mask
        """(b, t, dimension) -> the same shape."""
        if not self.training:
            out: Tensor = super().forward(src)
            return out
        own = self.self_attn
        projected = functional.linear(self.norm1(src), own.in_proj_weight, own.in_proj_bias)
        query, key, value = (split_heads(part, own.num_heads) for part in projected.chunk(3, -1))
        mixed = own.out_proj(attention(query, key, value, self.rate, True).transpose(1, 2).flatten(2))
        x = src + dropout(mixed, self.rate, True)
        inner = dropout(functional.gelu(self.linear1(self.norm2(x))), self.rate, True)
        return x + dropout(self.linear2(inner), self.rate, True)


class TextNetwork(RoutingNetwork):
    """Logits per expert from the embeddings of a sample's tokens.

    dimension: of the embeddings. max_tokens: only so many first tokens are read. width, segment: see the file's header.
    Raises RecipeError when the heads do not divide the width.
    """

    kind = "text"

    def __init__(
        self,
        dimension: int,
        experts: int,
        layers: int = 2,
        heads: int = 4,
        dropout: float = 0.1,
        max_tokens: int = 512,
        width: int | None = None,
        segment: int = 1,
    ) -> None:
        super().__init__()
        inner = width or dimension
        if inner % heads:
            raise RecipeError(f"router.heads ({heads}) must divide the router's width ({inner}): change router.heads")
        self.options = {
            "dimension": dimension,
            "experts": experts,
            "layers": layers,
            "heads": heads,
            "dropout": dropout,
            "max_tokens": max_tokens,
            "width": width,
            "segment": segment,
        }
        self.max_tokens, self.segment = max_tokens, segment
        self.entry = nn.Identity() if width is None else nn.Linear(dimension, width)
        self.encoder = nn.ModuleList(EncoderLayer(inner, heads, dropout) for _ in range(layers))
        self.attention = SelfAttention(inner, heads, dropout)
        self.norm = nn.LayerNorm(inner)
        self.head = nn.Sequential(nn.Linear(inner, inner // 2), nn.GELU(), nn.Linear(inner // 2, experts))

    def forward(self, features: Tensor) -> Tensor:
        """Embeddings, (b, t, dimension) -> logits, (b, experts)."""
        x = self.entry(average_segments(features[:, : self.max_tokens], self.segment))
        for layer in self.encoder:
            x = layer(x)
        x = self.norm(x + self.attention(x))  # (b, t, inner)
        logits: Tensor = self.head(x.mean(1))
        return logits


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(b, t, d) -> (b, heads, t, d / heads)."""
    return x.view(*x.shape[:2], heads, -1).transpose(1, 2)


def average_segments(x: Tensor, segment: int) -> Tensor:
    """Means of runs of `segment` vectors: (b, t, d) -> (b, ceil(t / segment), d); the last run may be shorter."""
    if segment == 1:
        return x
    batch, tokens, dimension = x.shape
    whole = tokens // segment * segment
    means = x[:, :whole].reshape(batch, tokens // segment, segment, dimension).mean(2)
    if whole == tokens:
        return means
    return torch.cat([means, x[:, whole:].mean(1, keepdim=True)], 1)
