"""What runtimes have in common when they score windows: checks, batches, and losses a few logits at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from moqe.errors import DataError, NumericalError

_LOGIT_ELEMENTS = 1 << 24  # logits held at once: 64 MiB of float32


def check_windows(tokens: Tensor) -> None:
    """Raise DataError unless tokens are windows, (n, window), in which there is something to predict."""
    if tokens.ndim != 2 or tokens.shape[1] < 2:
        raise DataError(f"windows to score must be (n, window) with at least 2 tokens, not {tuple(tokens.shape)}")


def batches(tokens: Tensor, most: int) -> Iterator[Tensor]:
    """Rows of (n, t) in order, as many at a time as `most` tokens allow, one at least."""
    rows = max(1, most // max(1, tokens.shape[1]))
    return (part for part in torch.split(tokens, rows) if len(part))


def token_losses(states: Tensor, targets: Tensor, head: Callable[[Tensor], Tensor], vocabulary: int) -> Tensor:
    """Cross-entropy of targets, int64 (n,), under the head's logits for states, (n, hidden): float32 nats, (n,)."""
    rows = max(1, _LOGIT_ELEMENTS // vocabulary)
    parts = zip(torch.split(states, rows), torch.split(targets, rows), strict=True)
    losses = [
        nn.functional.cross_entropy(head(part).to(torch.float32), target, reduction="none") for part, target in parts
    ]
    return torch.cat(losses)


def finite_losses(losses: Tensor, expert: str) -> Tensor:
    """The losses themselves. Raises NumericalError, naming the expert, when one is not finite."""
    if not torch.isfinite(losses).all():
        raise NumericalError(f"expert {expert}: a loss is not finite; build it again or remove it")
    return losses
