"""What a generalist and its specialists lose on the scored windows, at one width."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from moqe.advice.budget import FULL, VALIDATION_WINDOWS, Schedule
from moqe.evaluate.loss_table import Floats
from moqe.methods.distill import Student, Targets, TrainingSet, distill, snapshot_path
from moqe.models.device import mixed_precision
from moqe.progress import Progress

_ROWS = 4  # windows in a forward pass
_PROBED = 12  # choice windows that tell whether there is anything to win
_LOGIT_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class Scores:
    """Per window the mean over its tokens, float64 (n,); NaN where a window was not scored.

    nats: loss under the tokens that came. divergence: KL(base || expert), which is what the loss exceeds the base's by
    if the text were drawn from the base.
    """

    nats: Floats
    divergence: Floats

    def judged(self, by_text: bool) -> Floats:
        """What a gain is a difference of: the loss where experts follow the text, else the divergence."""
        return self.nats if by_text else self.divergence


@dataclass(frozen=True)
class Scored:
    """The scored windows with the base's answers. base: its losses, (n,). targets: its hidden states, from float32.

    by_text: whether experts follow the text as well as the base, so that gains are of loss.
    dtype: of the products of experts that are compared with each other. Against the base a bfloat16 product errs by as
    much as 8-bit codes, which cancels in a difference of two experts and not in a gap.
    """

    tokens: Tensor
    label: NDArray[np.str_]
    routed: NDArray[np.str_]
    document: NDArray[np.str_]
    judging: NDArray[np.bool_]  # the others are for choosing
    targets: Targets
    base: Floats
    dtype: torch.dtype
    by_text: bool = False


@dataclass(frozen=True)
class Width:
    """One width, measured.

    divergence_before: the generalist's on the choice windows, not yet distilled, nats. specialists: by label, scored
    where the label or the router says so; empty where nothing was trained. growth: the specialists' gain over that
    after half of their own steps; NaN where that was not looked at or nothing was gained. rounding: the divergence, per
    window, of which more bits would leave less: that of the untrained codes where the generalist followed the text,
    away from the base, and otherwise the generalist's own, None. promise: see the function; None: the generalist's
    divergence.
    """

    bits: int
    method: str
    divergence_before: float
    generalist: Scores
    specialists: Mapping[str, Scores]
    steps: int
    growth: float
    rounding: Floats | None = None
    promise: Floats | None = None

    @property
    def left(self) -> Floats:
        """`rounding`, or the generalist's divergence in its place."""
        return self.generalist.divergence if self.rounding is None else self.rounding

    @property
    def promises(self) -> Floats:
        """`promise`, or the generalist's divergence in its place."""
        return self.generalist.divergence if self.promise is None else self.promise


def score(student: Student, scored: Scored, rows: Sequence[int], dtype: torch.dtype) -> Scores:
    """Score windows at `rows` with products in `dtype`. Arrays are as long as there are windows, NaN elsewhere."""
    tokens, targets = scored.tokens, scored.targets
    nats, divergence = np.full(len(tokens), np.nan), np.full(len(tokens), np.nan)
    with torch.no_grad(), mixed_precision(dtype, student.device):
        for part in torch.split(torch.tensor(list(rows), dtype=torch.int64), _ROWS) if len(rows) else ():
            hidden = student.hidden(tokens[part][:, :-1])
            found = _token_scores(student, hidden, targets.hidden[part].to(hidden.device), tokens[part][:, 1:])
            nats[part.numpy()], divergence[part.numpy()] = (values.mean(1).double().cpu().numpy() for values in found)
    return Scores(nats, divergence)


def base_losses(student: Student, targets: Targets, tokens: Tensor) -> Floats:
    """The base's loss of every window, nats per token, from its hidden states and the head that experts share."""
    losses = []
    with torch.no_grad():
        for part in torch.split(torch.arange(len(tokens)), _ROWS):
            hidden = targets.hidden[part].to(student.device)
            losses.append(_token_scores(student, hidden, None, tokens[part][:, 1:])[0].mean(1).double().cpu())
    return np.asarray(torch.cat(losses).numpy())


def _token_scores(student: Student, hidden: Tensor, wanted: Tensor | None, following: Tensor) -> tuple[Tensor, Tensor]:
    """(loss, divergence) of every token, (b, t) each; without the base's states, `wanted`, divergence is 0."""
    size = max(1, _LOGIT_ELEMENTS // student.vocabulary)
    flat, target = hidden.flatten(0, 1), following.to(hidden.device).flatten()
    loss, divergence = [], []
    for start in range(0, len(flat), size):
        piece = slice(start, start + size)
        mine = student.head(flat[piece]).float().log_softmax(-1)
        loss.append(-mine.gather(1, target[piece, None])[:, 0])
        if wanted is None:
            divergence.append(torch.zeros_like(loss[-1]))
            continue
        theirs = student.head(wanted.flatten(0, 1)[piece]).float().log_softmax(-1)
        divergence.append((theirs.exp() * (theirs - mine)).sum(-1))
    return torch.cat(loss).view(hidden.shape[:2]), torch.cat(divergence).view(hidden.shape[:2])


def pace(student: Student, data: TrainingSet, scored: Scored) -> tuple[float, float]:
    """Seconds of a training step and of scoring one window, the second of two tries each. Changes nothing."""
    student.load_state({})
    seconds = []
    for _ in range(2):
        start = time.monotonic()
        data.targets.backward(student, data.tokens, data.train[: FULL.batch_windows])
        seconds.append(time.monotonic() - start)
    for parameter in student.parameters().values():
        parameter.grad = None
    rows = range(min(_ROWS, len(scored.tokens)))
    for _ in range(2):
        start = time.monotonic()
        score(student, scored, rows, scored.dtype)
        seconds.append((time.monotonic() - start) / len(rows))
    return seconds[1], seconds[3]


def choice_divergence(student: Student, scored: Scored) -> float:
    """The untrained expert's mean divergence on some choice windows, evenly taken."""
    student.load_state({})
    rows = np.flatnonzero(~scored.judging)
    rows = rows[:: max(1, len(rows) // _PROBED)]
    return float(score(student, scored, rows.tolist(), torch.float32).divergence[rows].mean())


def untrained(student: Student, bits: int, method: str, scored: Scored, divergence_before: float) -> Width:
    """A width at which nothing can be won: only its generalist is scored, as its method left it."""
    student.load_state({})
    scores = score(student, scored, range(len(scored.tokens)), torch.float32)
    return Width(bits, method, divergence_before, scores, {}, 0, float("nan"))


def trained(
    student: Student,
    bits: int,
    method: str,
    data: TrainingSet,
    scored: Scored,
    schedule: Schedule,
    divergence_before: float,
    own_weight: float,
    seed: int,
    folder: Path,
    most: int,
    go_on: Callable[[int, float], bool],
    progress: Progress,
) -> Width:
    """Distil a generalist and specialists that branch from it, and score them.

    own_weight: how much oftener specialists see their own windows. folder: for the trainings' states. Where there
    are fewer specialists than labels, those labels get one that promise most (`promise`). most: as many
    specialists, if time allows. go_on: is asked, before every specialist but the first, whether there is time for
    another one, given how many there are and the seconds that the last one took.
    """
    branch, halfway = schedule.branch_after, schedule.branch_after + schedule.own_steps // 2
    look = schedule.extrapolates
    snapshots = frozenset({branch, halfway} if look else {branch}) - {0}
    options = FULL.model_copy(
        update={
            "steps": schedule.steps,
            "branch_after": 0,
            "evaluate_every": max(1, schedule.steps // 2),
            "validation_windows": VALIDATION_WINDOWS,
        }
    )
    made = distill(
        student, data, options, seed, folder / "generalist", snapshots=snapshots, progress=progress, name=f"w{bits}"
    )
    student.load_state(made.state)
    everything = range(len(scored.tokens))
    untrained = None
    if scored.by_text:
        student.load_state({})
        untrained = score(student, scored, everything, scored.dtype)
        student.load_state(made.state)
    with progress.track(f"score w{bits}", len(everything)) as advance:
        generalist = score(student, scored, everything, scored.dtype)
        advance(len(everything))
    labels = sorted(set(data.label))
    hoped = promise(scored, generalist, untrained)
    need = {
        label: float(np.nansum(np.where((scored.label == label) & ~scored.judging, hoped, np.nan)))
        for label in labels
        if np.any((scored.label == label) | (scored.routed == label))  # a small cluster may have calibration alone
    }
    specialists: dict[str, Scores] = {}
    at_half, at_end, seconds = 0.0, 0.0, 0.0
    for label in sorted(need, key=lambda label: -need[label])[:most]:
        started = time.monotonic()
        if specialists and not go_on(len(specialists), seconds):
            break
        own = options.model_copy(update={"weights": {label: own_weight}, "branch_after": branch})
        place = folder / f"specialist-{labels.index(label)}"
        start = snapshot_path(folder / "generalist", branch) if branch else None
        found = distill(
            student,
            data,
            own,
            seed,
            place,
            start=start,
            snapshots=frozenset({halfway}) if look else frozenset(),
            progress=progress,
            name=f"w{bits} for {label}",
        )
        student.load_state(found.state)
        rows = np.flatnonzero((scored.label == label) | (scored.routed == label)).tolist()
        specialists[label] = score(student, scored, rows, scored.dtype)
        if look:
            mine = scored.label == label
            for sign, trained_in in ((1.0, folder / "generalist"), (-1.0, place)):
                student.load_state(_snapshot(trained_in, halfway))
                then = score(student, scored, np.flatnonzero(mine).tolist(), scored.dtype)
                at_half += sign * float(then.judged(scored.by_text)[mine].sum())
            at_end += float((generalist.judged(scored.by_text) - specialists[label].judged(scored.by_text))[mine].sum())
        seconds = time.monotonic() - started
    return Width(
        bits,
        method,
        divergence_before,
        generalist,
        specialists,
        schedule.steps,
        _growth(at_half, at_end),
        None if untrained is None else untrained.divergence,
        hoped,
    )


def promise(scored: Scored, generalist: Scores, untrained: Scores | None) -> Floats:
    """What a specialist's gain may be in proportion to: nats of every scored window, (n,).

    What the generalist has left to follow of the base; or, where the text is followed (`untrained` is the loss of the
    codes before any training), how much it has adapted, taking half of what rounding costs for mended.
    """
    if untrained is None:
        return generalist.divergence
    mended: Floats = (scored.base + untrained.nats) / 2 - generalist.nats
    return mended


def _growth(at_half: float, at_end: float) -> float:
    """By what a gain grew in the second half: infinite where it only then began, NaN where there is none."""
    if at_end <= 0:
        return float("nan")
    return at_end / at_half if at_half > 0 else float("inf")


def _snapshot(folder: Path, step: int) -> dict[str, Tensor]:
    """The parameters that a training had after `step`."""
    stored = load_file(snapshot_path(folder, step))
    return {name.removeprefix("now/"): tensor for name, tensor in stored.items() if name.startswith("now/")}
