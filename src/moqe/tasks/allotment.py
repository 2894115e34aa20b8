"""Only where it pays: which blocks of which specialists get scales of their own, within a bound on bytes.

A unit is one block of one specialist: its scales are a file of their own, or a link to the generalist's. What a unit is
worth is estimated on held-out windows without trying each one: with g the gradient of the divergence, taken at the
generalist's and at the specialist's scales, going from one to the other in one block changes it by about

    (g_generalist + g_specialist) / 2 . (specialist - generalist)

which is exact for a quadratic where blocks do not interact. Units are taken by gain per byte until the bytes are spent;
then the divergence is measured, at a few points in between as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moqe.methods.distill import Student, Targets

State = Mapping[str, Tensor]
_ROWS = 4


@dataclass(frozen=True)
class Unit:
    """One block of one specialist. gain: estimated, nats a token on its own windows. bytes: its own scales take."""

    expert: str
    block: int
    bytes: int
    gain: float


def allot(units: Iterable[Unit], bytes_to_spend: int) -> list[Unit]:
    """The units to specialise: those that gain anything, the most per byte first, as long as they fit."""
    chosen, left = [], bytes_to_spend
    order = sorted(units, key=lambda unit: (-unit.gain / unit.bytes, unit.expert, unit.block))
    for unit in order:
        if unit.gain > 0 and unit.bytes <= left:
            chosen.append(unit)
            left -= unit.bytes
    return chosen


def block_of(name: str, blocks: Sequence[str]) -> int:
    """Which block a parameter belongs to. Raises ValueError where it belongs to none."""
    for index, block in enumerate(blocks):
        if name.startswith(f"{block}."):
            return index
    raise ValueError(f"{name} is in no block")


def mixed_state(general: State, special: State, own: Iterable[int], blocks: Sequence[str]) -> dict[str, Tensor]:
    """A specialist's state in the blocks `own`, the generalist's in all others."""
    kept = set(own)
    return {name: special[name] if block_of(name, blocks) in kept else value for name, value in general.items()}


def block_gains(
    student: Student,
    targets: Targets,
    tokens: Tensor,
    rows: Tensor,
    general: State,
    special: State,
    blocks: Sequence[str],
) -> list[float]:
    """By how much each block of a specialist lowers the divergence at `rows`, nats a token, to first order."""
    slopes = [_slope(student, targets, tokens, rows, state) for state in (general, special)]
    gains = [0.0] * len(blocks)
    for name, value in general.items():
        step = (special[name] - value).double()
        middle = (slopes[0][name] + slopes[1][name]).double() / 2
        gains[block_of(name, blocks)] -= float((middle * step).sum())
    return gains


def _slope(student: Student, targets: Targets, tokens: Tensor, rows: Tensor, state: State) -> dict[str, Tensor]:
    """The gradient of the mean divergence at `rows` in a state."""
    student.load_state(state)
    parameters = student.parameters()
    total = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for part in torch.split(rows, _ROWS):
        for parameter in parameters.values():
            parameter.grad = None
        targets.backward(student, tokens, part)
        for name, parameter in parameters.items():
            if parameter.grad is not None:
                total[name] += parameter.grad * (len(part) / len(rows))
    return total
