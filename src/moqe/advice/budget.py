"""How much can be measured in the minutes given: timed first, planned then, and what was cut is said."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from moqe.recipe import Specialists

FULL = Specialists().distill  # the training of a build
FULL_OWN = FULL.steps - FULL.branch_after  # steps in which its specialists differ from the generalist
# Steps of an expert, and after how many of them a specialist branches from the generalist; the first is a build's own.
# Branching late saves little: the rate falls as a cosine, and from half way on a training has a fifth of it left.
LADDER = (
    (FULL.steps, FULL.branch_after),
    *(
        (steps, steps // 8)
        for steps in (96, 80, 64, 56, 48, 40, 32, 28, 24, 20, 16, 12, 8)
        if steps < FULL.steps or not FULL.branch_after
    ),
)
USABLE = 0.85  # of the time left is planned; timings on a busy machine are off by about that much
MOST_WINDOWS = (512, 48, 96)  # calibration, choice, judging
STATISTICS_WINDOWS = 96  # of the calibration windows, for codes; what is distilled on fewer overfits to them
LEAST_WINDOWS = (16, 12, 24)
CALIBRATION_SHARE, SCORING_SHARE = 0.2, 0.25  # of the time, where there are more windows than that has room for
VALIDATION_WINDOWS = 6
TELLING_STEPS = 24
_SCORES = 2.4  # forward passes of a scored window: the generalist's, its own specialist's, now and then another one's


@dataclass
class Clock:
    """Seconds since the beginning, and how many there are."""

    seconds: float
    started: float = field(default_factory=time.monotonic)
    spent: dict[str, float] = field(default_factory=dict)

    @property
    def used(self) -> float:
        """Seconds so far."""
        return time.monotonic() - self.started

    @property
    def left(self) -> float:
        """Seconds to go; negative when it took longer."""
        return self.seconds - self.used

    def lap(self, step: str) -> None:
        """Note what has passed since the last lap as the time of `step`."""
        self.spent[step] = self.used - sum(self.spent.values())


@dataclass(frozen=True)
class Schedule:
    """What is measured at each width.

    steps: of distillation, of the generalist and of each specialist. branch_after: of these are the generalist's.
    specialists: how many are trained.
    """

    steps: int
    branch_after: int
    specialists: int

    @property
    def own_steps(self) -> int:
        """Steps in which a specialist differs from the generalist."""
        return self.steps - self.branch_after

    @property
    def extrapolates(self) -> bool:
        """Whether specialists are trained for less than in a build, so that a build's have to be extrapolated."""
        return self.own_steps < FULL_OWN

    def seconds(self, step_seconds: float, score_seconds: float, windows: int) -> float:
        """What a width takes. step_seconds: of a training step; score_seconds: of one of `windows` scored windows."""
        training = self.steps + self.specialists * self.own_steps
        validation = 3 * (1 + self.specialists) * VALIDATION_WINDOWS
        scoring = (_SCORES + 2 * self.extrapolates) * windows
        return training * step_seconds + (validation + scoring) * score_seconds


def plan(
    seconds: float,
    widths: int,
    specialists: int,
    windows: int,
    step_seconds: float,
    score_seconds: float,
    steps: int | None = None,
) -> Schedule:
    """The longest training that fits `widths` times into `seconds`; the smallest schedule where nothing does.

    Before a specialist gets fewer than TELLING_STEPS of its own, fewer are trained, down to two: too short a training
    says little about a long one, while specialists resemble each other. steps: fixes the training, of all specialists.
    """
    if steps is not None:
        return Schedule(steps, 0, specialists)
    fewest = min(2, specialists)
    counts = range(specialists, fewest - 1, -1)
    telling = [one for one in LADDER if one[0] - one[1] >= TELLING_STEPS]
    shorter = [one for one in LADDER if one not in telling]
    tried = [Schedule(*length, count) for count in counts for length in telling]
    tried += [Schedule(*length, fewest) for length in shorter]
    tried.append(Schedule(*LADDER[-1], 1))
    for one in tried:
        if widths * one.seconds(step_seconds, score_seconds, windows) <= USABLE * seconds:
            return one
    return tried[-1]


def affordable_windows(
    seconds: float,
    window_seconds: float,
    widths: int,
    there: tuple[int, int, int],
) -> tuple[int, int, int]:
    """How many windows of calibration, choice and judging the time allows, of those there are, up to MOST_WINDOWS.

    window_seconds: of the base's forward pass. Calibration windows run through the base twice, for statistics and for
    what distillation follows (those beyond STATISTICS_WINDOWS once, which leaves time over); scored ones through the
    base once and through several experts of each width.
    """
    calibration = int(CALIBRATION_SHARE * seconds / (2 * window_seconds))
    scored = int(SCORING_SHARE * seconds / ((1 + widths * (_SCORES + 2)) * window_seconds))
    fitting = (calibration, scored // 3, scored - scored // 3)
    sizes = [
        min(have, most, max(least, fits))
        for have, most, least, fits in zip(there, MOST_WINDOWS, LEAST_WINDOWS, fitting, strict=True)
    ]
    return sizes[0], sizes[1], sizes[2]


def described_cuts(
    schedule: Schedule, specialists: int, taken: tuple[int, int, int], there: tuple[int, int, int]
) -> list[str]:
    """What the time left no room for, in words. taken, there: windows of calibration, choice, judging."""
    cuts = []
    if (schedule.steps, schedule.own_steps) != (FULL.steps, FULL_OWN):
        cuts.append(
            f"distillation: {schedule.steps} steps, {schedule.own_steps} of them a specialist's own, where a build "
            f"takes {FULL.steps} and {FULL_OWN}"
        )
    for role, used, have in zip(("calibration", "choice", "judging"), taken, there, strict=True):
        if used < have:
            cuts.append(f"{role}: {used} of {have} windows")
    if schedule.specialists < specialists:
        cuts.append(f"specialists: {schedule.specialists} of {specialists}")
    return cuts
