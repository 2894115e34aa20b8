"""Quality beside speed: what a fast runtime says, token by token, against the reference runtime on the same expert.

Both see the same windows and give logits at every position. Differences of logits say how far arithmetic parts;
divergence, equal first choices and the ratio of perplexities say whether anybody would notice. A runtime that agrees
may stand in for the reference, one that does not has losses of its own, and its tables are its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from moqe.errors import DataError
from moqe.progress import Advance, ignore
from moqe.runtimes.runtime import Runtime
from moqe.store import read_json, reading, write_json


@dataclass(frozen=True)
class Agreement:
    """One expert in one runtime, against the reference on the same windows.

    positions: tokens compared. largest, mean: absolute difference of logits. divergence: Kullback-Leibler, of the
    runtime's distribution from the reference's, nats per token. same_top: share of positions with the same likeliest
    token. perplexity_ratio: the runtime's over the reference's.
    """

    expert: str
    runtime: str
    positions: int
    largest: float
    mean: float
    divergence: float
    same_top: float
    perplexity_ratio: float


def agreement(expert: str, reference: Runtime, other: Runtime, tokens: Tensor, advance: Advance = ignore) -> Agreement:
    """Compare two runtimes of one expert on windows, int64 (n, window), one window at a time.

    The last token of a window is only predicted. `advance` is told of every window. Raises DataError without windows of
    at least two tokens, and what the runtimes raise.
    """
    if tokens.ndim != 2 or len(tokens) == 0 or tokens.shape[1] < 2:
        raise DataError(f"windows to compare must be (n, window) with at least 2 tokens, not {tuple(tokens.shape)}")
    parts = []
    for window in torch.split(tokens, 1):
        parts.append(
            compare_logits(reference.logits(window[:, :-1])[0], other.logits(window[:, :-1])[0], window[0, 1:])
        )
        advance(1)
    sums = torch.stack(parts)  # (n, 5)
    positions = tokens.shape[0] * (tokens.shape[1] - 1)
    mean, divergence, same, excess = (float(value) / positions for value in sums[:, 1:].sum(0))
    return Agreement(expert, other.name, positions, float(sums[:, 0].max()), mean, divergence, same, math.exp(excess))


def compare_logits(reference: Tensor, other: Tensor, targets: Tensor) -> Tensor:
    """Two runtimes on one window, logits (t, vocabulary) and what came next, (t,): float64, (5,).

    The largest absolute difference; and sums over positions of the mean absolute difference, the divergence, equal
    likeliest tokens, and by how many nats the other's loss is higher.
    """
    reference, other = reference.double(), other.double()
    difference = (other - reference).abs()
    theirs, ours = other.log_softmax(-1), reference.log_softmax(-1)
    divergence = nn.functional.kl_div(theirs, ours, reduction="none", log_target=True).sum()
    same = (other.argmax(-1) == reference.argmax(-1)).sum()
    excess = (ours - theirs).gather(-1, targets[:, None]).sum()
    return torch.stack([difference.max(), difference.mean(-1).sum(), divergence, same.double(), excess])


def add_agreements(path: Path, found: Sequence[Agreement]) -> None:
    """Write what was measured into a mixture's file of agreements, in place of the same runtimes' earlier rows."""
    measured = {one.runtime for one in found}
    kept = [one for one in read_agreements(path) if one.runtime not in measured]
    ordered = sorted([*kept, *found], key=lambda one: one.runtime)
    write_json(path, [asdict(one) for one in ordered])


def read_agreements(path: Path) -> list[Agreement]:
    """What was measured so far; nothing where there is no file. Raises CheckpointError when it is damaged."""
    if not path.exists():
        return []
    with reading(path):
        return [Agreement(**entry) for entry in read_json(path)]
