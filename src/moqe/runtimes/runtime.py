"""The seam between an expert and what runs it: losses, logits and text from token ids, whatever the engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class Runtime(Protocol):
    """One expert, or the base model, ready to run. Token ids go in, never text."""

    name: str  # stands beside every number the runtime makes

    def score(self, tokens: Tensor) -> Tensor:
        """Loss of every next token, in nats.

        tokens: int64, (n, window), packed windows without padding. Returns float32, (n, window - 1) on the CPU: column
        i is the loss of token i + 1 given the tokens before it. Raises NumericalError when a loss is not finite.
        """

    def logits(self, tokens: Tensor) -> Tensor:
        """Logits at every position: float32, (n, window, vocabulary), for int64 tokens, (n, window)."""

    def generate(
        self,
        tokens: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        seed: int = 0,
        stop: Sequence[int] = (),
    ) -> list[int]:
        """Continue a prompt of token ids, (1, t), by at most `max_new_tokens`.

        Temperature 0 takes the likeliest token; above, tokens are drawn with `seed`. A stop token ends the text and is
        not returned.
        """
