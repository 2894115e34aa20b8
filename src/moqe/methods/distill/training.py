"""The training of an expert's scales: which windows, in which order, with which rate, and when to stop.

Adam (Kingma and Ba, 2015) on log-scales with a short warm-up and a cosine to zero. Domains take turns in proportion to
their windows times their weights, so a generalist and a specialist differ in nothing but these proportions. Every few
steps the divergence on held-out windows, weighed alike, is measured; the best state is kept.

Cost: about three forward passes of the model per window and step (one forward, two products backward), and a fourth
where blocks are run again, see `Student`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from moqe.errors import DataError, NumericalError
from moqe.formats.safetensors_folder import save_tensors
from moqe.method_options import Distill
from moqe.methods.distill.student import Student
from moqe.methods.distill.targets import Targets
from moqe.progress import Progress, Silent

WARM_UP = 0.05  # of the steps
BETAS = (0.9, 0.95)
NORM_RATE = 0.1  # of the learning rate: a norm's weight moves all linears behind it
_SAVED_EVERY = 16


@dataclass(frozen=True)
class TrainingSet:
    """Windows with their labels and the base's answers.

    tokens: int64, (n, t). label: the domain or cluster of each window. train, validation: rows, of disjoint documents.
    """

    tokens: Tensor
    label: Sequence[str]
    targets: Targets
    train: Tensor
    validation: Tensor


@dataclass(frozen=True)
class Distilled:
    """A trained state and how it came about.

    state: for `Student.load_state`. step: after which it was taken. divergence: on the validation windows, nats, by
    step; step 0 is the untrained expert, or the state it began with.
    """

    state: Mapping[str, Tensor]
    step: int
    divergence: Mapping[int, float]


def distill(
    student: Student,
    data: TrainingSet,
    options: Distill,
    seed: int,
    folder: Path,
    *,
    start: Path | None = None,
    snapshots: frozenset[int] = frozenset(),
    progress: Progress | None = None,
    name: str = "expert",
) -> Distilled:
    """Train a student, or go on where an interrupted training stopped.

    folder: keeps the state of the training, and `snapshot_path` of every step in `snapshots`. start: such a snapshot of
    an expert with the same codes, from which this training branches.
    Raises DataError where there is nothing to train or validate on, NumericalError when the divergence is not finite.
    """
    if len(data.train) == 0 or len(data.validation) == 0:
        raise DataError(f"expert {name!r}: distillation needs windows to train on and to validate on: add calibration")
    run = _Run(student, data, options, seed, folder, snapshots, name)
    run.begin(start)
    with (progress or Silent()).track(f"distill {name}", options.steps) as advance:
        advance(run.step)
        while run.step < options.steps:
            run.update()
            advance(1)
    return run.result()


def snapshot_path(folder: Path, step: int) -> Path:
    """Where a training keeps its state after `step` for those that branch from it."""
    return folder / f"snapshot-{step}.safetensors"


class _Run:
    """One training with everything that a resumed run needs to end in the same bytes."""

    def __init__(
        self,
        student: Student,
        data: TrainingSet,
        options: Distill,
        seed: int,
        folder: Path,
        snapshots: frozenset[int],
        name: str,
    ) -> None:
        self.student, self.data, self.options, self.folder, self.name = student, data, options, folder, name
        self.snapshots = snapshots
        self.parameters = student.parameters()
        norms = [self.parameters[name] for name in student.norms]
        scales = [parameter for name, parameter in self.parameters.items() if name not in student.norms]
        groups = [{"params": scales, "share": 1.0}] + ([{"params": norms, "share": NORM_RATE}] if norms else [])
        self.adam = torch.optim.Adam(groups, lr=options.learning_rate, betas=BETAS)
        self.weights = {label: weight for label, weight in options.weights.items() if weight is not None}
        length = options.steps * options.batch_windows
        self.schedule = window_schedule(data.label, data.train, self.weights, length, seed)
        self.step, self.best_step = 0, 0
        self.divergence: dict[int, float] = {}
        self.best: dict[str, Tensor] = {}

    def begin(self, start: Path | None) -> None:
        """Take up an interrupted training, branch from `start`, or begin anew."""
        if self._checkpoint.exists():
            self._restore(self._checkpoint)
            return
        self.student.load_state({})
        if start is not None:
            self._restore(start)
            self.divergence = {}
        self._evaluate()

    def update(self) -> None:
        """One step of Adam."""
        size, options = self.options.batch_windows, self.options
        rows = self.schedule[self.step * size : (self.step + 1) * size]
        rate = options.learning_rate * rate_share(self.step, options.steps)
        for group in self.adam.param_groups:
            group["lr"] = rate * group["share"]
        self.adam.zero_grad(set_to_none=True)
        loss = self.data.targets.backward(self.student, self.data.tokens, rows)
        if not math.isfinite(loss):
            raise NumericalError(
                f"expert {self.name!r}: the divergence is not finite at step {self.step} of distillation: "
                "lower distill.learning_rate"
            )
        self.adam.step()
        self.step += 1
        if self.step % options.evaluate_every == 0 or self.step == options.steps:
            self._evaluate()
        if self.step in self.snapshots:  # first: a training that goes on from the checkpoint does not come by again
            self._save(snapshot_path(self.folder, self.step))
        if self.step % _SAVED_EVERY == 0 or self.step == options.steps:
            self._save(self._checkpoint)

    def result(self) -> Distilled:
        """The best state found."""
        return Distilled(self.best, self.best_step, self.divergence)

    @property
    def _checkpoint(self) -> Path:
        return self.folder / "training.safetensors"

    def _evaluate(self) -> None:
        rows = self.data.validation
        found = torch.cat(
            [self.data.targets.divergence(self.student, self.data.tokens, part) for part in torch.split(rows, 4)]
        )
        weights = torch.tensor([self.weights.get(self.data.label[row], 1.0) for row in rows.tolist()])
        value = float((found.double() * weights).sum() / weights.sum())
        if not self.divergence or value < min(self.divergence.values()):
            self.best, self.best_step = self.student.state(), self.step
        self.divergence[self.step] = value

    def _save(self, path: Path) -> None:
        """Parameters, Adam's moments, the best state and the curve, in one safetensors file."""
        tensors = {f"now/{name}": tensor for name, tensor in self.student.state().items()}
        tensors |= {f"best/{name}": tensor for name, tensor in self.best.items()}
        for name, parameter in self.parameters.items():
            moments = self.adam.state[parameter]
            tensors |= {f"adam/{key}/{name}": moments[key] for key in ("exp_avg", "exp_avg_sq")}
        steps = sorted(self.divergence)
        tensors |= {
            "steps": torch.tensor([self.step, self.best_step]),
            "curve/steps": torch.tensor(steps),
            "curve/divergence": torch.tensor([self.divergence[step] for step in steps], dtype=torch.float64),
        }
        save_tensors(path, tensors)

    def _restore(self, path: Path) -> None:
        stored = load_file(path)
        self.step, self.best_step = (int(value) for value in stored["steps"])
        self.student.load_state(_under("now/", stored))
        self.best = _under("best/", stored)
        self.divergence = dict(zip(stored["curve/steps"].tolist(), stored["curve/divergence"].tolist(), strict=True))
        for name, parameter in self.parameters.items():
            moments = {key: stored[f"adam/{key}/{name}"].to(parameter.device) for key in ("exp_avg", "exp_avg_sq")}
            self.adam.state[parameter] = {"step": torch.tensor(float(self.step)), **moments}


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def rate_share(step: int, steps: int) -> float:
    """The learning rate at a step, as a share of the highest: linear warm-up, then half a cosine to zero."""
    warm = max(1, round(WARM_UP * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1.0 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def window_schedule(
    label: Sequence[str], train: Tensor, weights: Mapping[str, float], length: int, seed: int
) -> Tensor:
    """Which window each turn takes: int64, (length,). label: of every window. train: the rows there are to choose from.

    Labels take turns so that after any number of turns each has had its share, windows times weight, to within one;
    within a label windows come in a seeded order, again and again.
    Raises DataError when every window has the weight zero.
    """
    rows_of: dict[str, list[int]] = {}
    for row in train.tolist():
        rows_of.setdefault(label[row], []).append(row)
    names = sorted(rows_of)
    share = np.array([len(rows_of[name]) * weights.get(name, 1.0) for name in names])
    if share.sum() <= 0:
        raise DataError("distillation has no window to train on: every domain's weight is 0")
    share = share / share.sum()
    orders = {name: np.random.default_rng([seed, index]).permutation(rows_of[name]) for index, name in enumerate(names)}
    due, taken, schedule = np.zeros(len(names)), np.zeros(len(names), np.int64), []
    for _ in range(length):
        due += share
        turn = int(due.argmax())
        due[turn] -= 1.0
        order = orders[names[turn]]
        schedule.append(int(order[taken[turn] % len(order)]))
        taken[turn] += 1
    return torch.tensor(schedule, dtype=torch.int64)
