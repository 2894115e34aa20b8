"""Outcomes: what a way of answering scores on every sample, and what it pays.

A router's choice sends each sample to one expert. A cascade may ask a second one; what the two answer together is not
in any loss table and is computed from their predictions and the true class.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moqe.data.classification import class_values
from moqe.errors import ProtocolError
from moqe.evaluate.loss_table import Floats, LossTable
from moqe.evaluate.predictions import Predictions
from moqe.router.cascade import CascadeAnswer

Choice = NDArray[np.int64]
_SMALLEST = float(np.finfo(np.float32).tiny)  # a probability of zero costs 87 nats


@dataclass(frozen=True)
class Outcome:
    """What n samples score and cost.

    values: per metric the sum over a sample's scored units, (n,). asked: whether each expert answers each sample, 0 or
    1, (n, experts); several answer by the mean of their probabilities. cost: forward passes of an expert, (n,); more
    than answers where the router itself needs one.
    """

    values: Mapping[str, Floats]
    asked: Floats
    cost: Floats

    def __len__(self) -> int:
        return len(self.cost)

    @property
    def mean_cost(self) -> float:
        """Forward passes of an expert per sample."""
        return float(self.cost.mean())

    @property
    def share(self) -> Floats:
        """The share of samples that each expert answers, (experts,)."""
        share: Floats = self.asked.mean(0)
        return share

    def select(self, rows: NDArray[np.bool_] | NDArray[np.int64]) -> Outcome:
        """The outcome on some samples only, by mask or by position."""
        return Outcome({name: value[rows] for name, value in self.values.items()}, self.asked[rows], self.cost[rows])


def routed(tables: Mapping[str, LossTable], choice: Choice, runs_first: int | None = None) -> Outcome:
    """The outcome of sending sample i to expert `choice[i]`.

    tables: per metric, of the same samples and experts. runs_first: the expert whose features the router sees, if any:
    one more pass where another one answers. Raises ProtocolError for a choice that does not fit the tables.
    """
    table = next(iter(tables.values()))
    experts = len(table.experts)
    if choice.shape != (len(table),) or (len(choice) and not 0 <= choice.min() <= choice.max() < experts):
        raise ProtocolError(
            f"a router chose for {choice.shape[0]} samples among experts {choice.min()} to {choice.max()}, and there "
            f"are {len(table)} samples and {experts} experts: route these samples again"
        )
    asked = _one_hot(choice, experts)
    values = {name: table.chosen(choice) for name, table in tables.items()}
    return Outcome(values, asked, _cost(asked, runs_first))


def cascaded(
    tables: Mapping[str, LossTable], predictions: Predictions, answer: CascadeAnswer, runs_first: int | None = None
) -> Outcome:
    """The outcome of a cascade's answers. Samples for which nobody else is asked score what the loss table says.

    predictions: of the tables' samples. runs_first: as in `routed`.
    """
    first, second, used = (part.cpu().numpy() for part in (answer.first, answer.second, answer.second_used))
    alone = routed(tables, first, runs_first)
    probabilities = answer.probabilities.double().cpu().numpy()
    together = class_values(np.log(np.maximum(probabilities, _SMALLEST)), predictions.label)
    values = {name: np.where(used, together[name], value) for name, value in alone.values.items()}
    asked = np.maximum(alone.asked, _one_hot(second, alone.asked.shape[1]) * used[:, None])
    return Outcome(values, asked, _cost(asked, runs_first))


def _one_hot(choice: Choice, experts: int) -> Floats:
    chosen: Floats = (choice[:, None] == np.arange(experts)[None, :]).astype(np.float64)
    return chosen


def _cost(asked: Floats, runs_first: int | None) -> Floats:
    ran = asked.copy()
    if runs_first is not None:
        ran[:, runs_first] = 1.0
    cost: Floats = ran.sum(1)
    return cost
