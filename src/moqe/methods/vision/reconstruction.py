"""Reconstruction of one block: train the rounding of its weights and the steps of its inputs against its own output.

Source: Li et al., BRECQ, ICLR 2021 (arXiv 2102.05426), algorithm 1.

The error is the squared difference to the full-precision block's output, weighed by the Fisher information and divided
by the error of rounding to nearest, so that 1 is where a block starts and one regularizer weight fits every block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moqe.errors import NumericalError
from moqe.method_options import Brecq
from moqe.methods.vision.learned_rounding import LearnedRounding
from moqe.methods.vision.lsq import LearnedStep
from moqe.methods.vision.observe import BATCH
from moqe.methods.vision.training import shuffled

BETA = (20.0, 2.0)  # of the regularizer, from and to


@dataclass(frozen=True)
class Reconstructed:
    """Weighted mean squared errors of a block's output on all images: rounded to nearest, and as learned.

    settled: share of weights whose rounding had reached 0 or 1 before it was made hard.
    """

    nearest_error: float
    learned_error: float
    settled: float


@dataclass(frozen=True)
class Task:
    """One block with what it is trained on.

    inputs: what the quantized part before it puts in, (n, ...). targets: what the full-precision block puts out,
    (n, ...). weights: Fisher, the shape of one output.
    """

    block: nn.Module
    roundings: Sequence[LearnedRounding]
    steps: Sequence[LearnedStep]
    inputs: Tensor
    targets: Tensor
    weights: Tensor

    def error(self, rows: Tensor) -> Tensor:
        """Weighted mean squared error of the block's output on these images."""
        difference: Tensor = self.block(self.inputs[rows]) - self.targets[rows]
        return (difference.square() * self.weights).mean()

    @torch.no_grad()
    def total_error(self) -> float:
        """The error over all images."""
        count = len(self.inputs)
        rows_of = torch.split(torch.arange(count), BATCH)
        return sum(float(self.error(rows)) * len(rows) for rows in rows_of) / count


def reconstruct(
    task: Task, options: Brecq, generator: torch.Generator, advance: Callable[[int], None]
) -> Reconstructed:
    """Train a block's roundings and steps; on return its roundings are hard.

    Raises NumericalError when the error is not finite.
    """
    for rounding in task.roundings:
        rounding.hard = True
    nearest = task.total_error()
    for rounding in task.roundings:
        rounding.hard = False
    if nearest == 0.0:
        advance(options.steps)
        return _finish(task, nearest)
    groups: list[dict[str, Any]] = [
        {"params": [rounding.v for rounding in task.roundings], "lr": options.learning_rate}
    ]
    groups += [
        {"params": [step.step], "lr": options.step_learning_rate * float(step.step.detach())} for step in task.steps
    ]
    optimizer = torch.optim.Adam(groups)
    schedules = [_constant, *[_cosine(options.steps)] * len(task.steps)]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, schedules)
    weights = sum(rounding.v.numel() for rounding in task.roundings)
    rows_of = shuffled(len(task.inputs), min(options.batch_size, len(task.inputs)), generator)
    for index in range(options.steps):
        error = task.error(next(rows_of)) / nearest
        if not torch.isfinite(error):
            raise NumericalError(f"block reconstruction is not finite after {index} steps: lower learning_rate")
        done = (index / options.steps - options.warmup) / (1.0 - options.warmup)
        loss = error
        if done >= 0.0:
            beta = BETA[0] + (BETA[1] - BETA[0]) * done
            penalty = torch.stack([rounding.regularizer(beta) for rounding in task.roundings]).sum() / weights
            loss = error + options.rounding_weight * penalty
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        for step in task.steps:
            step.keep_positive()
        advance(1)
    return _finish(task, nearest)


def _finish(task: Task, nearest: float) -> Reconstructed:
    counts = [rounding.v.numel() for rounding in task.roundings]
    settled = sum(count * rounding.settled() for count, rounding in zip(counts, task.roundings, strict=True))
    for rounding in task.roundings:
        rounding.hard = True
    return Reconstructed(nearest, task.total_error(), settled / sum(counts))


def _constant(index: int) -> float:
    return 1.0


def _cosine(steps: int) -> Callable[[int], float]:
    return lambda index: 0.5 * (1.0 + math.cos(math.pi * index / steps))
