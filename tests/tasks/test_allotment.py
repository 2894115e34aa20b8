"""Spending bytes where they gain most, and estimating what a block gains."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moqe.tasks.allotment import Unit, allot, block_gains, block_of, mixed_state

BLOCKS = ("model.layers.1", "model.layers.10")
UNITS = st.lists(
    st.builds(Unit, st.sampled_from("abc"), st.integers(0, 9), st.integers(1, 100), st.floats(-1.0, 1.0)), max_size=20
)


@settings(max_examples=60, deadline=None)
@given(UNITS, st.integers(0, 500))
def test_no_more_is_spent_than_there_is_and_nothing_that_gains_nothing(units: list[Unit], budget: int) -> None:
    chosen = allot(units, budget)
    assert sum(unit.bytes for unit in chosen) <= budget
    assert all(unit.gain > 0 for unit in chosen)
    left = budget - sum(unit.bytes for unit in chosen)
    rest = list(units)
    for unit in chosen:
        rest.remove(unit)
    assert all(unit.gain <= 0 or unit.bytes > left for unit in rest)


def test_the_most_per_byte_comes_first() -> None:
    units = [Unit("a", 0, 10, 1.0), Unit("a", 1, 1, 0.5), Unit("b", 0, 5, 0.1)]
    assert allot(units, 11) == [units[1], units[0]]
    assert allot(units, 6) == [units[1], units[2]]


def test_blocks_are_told_apart_by_their_whole_name() -> None:
    assert block_of("model.layers.10.mlp.weight", BLOCKS) == 1
    with pytest.raises(ValueError, match="in no block"):
        block_of("model.norm.weight", BLOCKS)
    general = {"model.layers.1.x": torch.zeros(1), "model.layers.10.x": torch.zeros(1)}
    special = {name: torch.ones(1) for name in general}
    assert mixed_state(general, special, [1], BLOCKS) == {
        "model.layers.1.x": general["model.layers.1.x"],
        "model.layers.10.x": special["model.layers.10.x"],
    }


class Quadratic:
    """Student and targets in one: the divergence at row r is sum of curvature * (x - goal_r)^2."""

    goal = torch.tensor([[1.0, -1.0], [3.0, 0.0], [2.0, 4.0], [0.0, 0.0], [1.0, 1.0], [5.0, -2.0]])
    curvature = (0.5, 2.0)

    def __init__(self) -> None:
        self.values = {f"{block}.x": torch.nn.Parameter(torch.zeros(1)) for block in BLOCKS}

    def load_state(self, state: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, value in state.items():
                self.values[name].copy_(value)

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        return self.values

    def loss(self, rows: Tensor) -> Tensor:
        parts = zip(self.values.values(), self.curvature, self.goal[rows].T, strict=True)
        return torch.stack([weight * (x - goal).square() for x, weight, goal in parts]).sum(0)  # (rows,)

    def backward(self, _student: Any, _tokens: Tensor, rows: Tensor) -> float:
        mean = self.loss(rows).mean()
        mean.backward()  # type: ignore[no-untyped-call]
        return float(mean.detach())


def test_gains_of_a_quadratic_are_exact() -> None:
    model: Any = Quadratic()
    rows = torch.arange(6)  # not a multiple of the batch
    general = {name: torch.tensor([0.3]) for name in model.values}
    special = {name: torch.tensor([value]) for name, value in zip(model.values, (1.7, 0.9), strict=True)}
    gains = block_gains(model, model, torch.zeros(6, 4), rows, general, special, BLOCKS)
    for block, gain in enumerate(gains):
        model.load_state(general)
        before = float(model.loss(rows).mean().detach())
        model.load_state(mixed_state(general, special, [block], BLOCKS))
        assert gain == pytest.approx(before - float(model.loss(rows).mean().detach()), abs=1e-5)
