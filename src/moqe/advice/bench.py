"""What measuring a width needs, made once for all: codes, the base's answers, a router; and the order of work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import nn

from moqe.advice.budget import FULL, STATISTICS_WINDOWS, VALIDATION_WINDOWS, Clock, Schedule, plan
from moqe.advice.codes import make_codes
from moqe.advice.measurement import Scored, Width, base_losses, choice_divergence, pace, trained, untrained
from moqe.advice.samples import AdviceSamples
from moqe.formats import open_expert, write_shared
from moqe.formats.compressed_tensors import SHARED_TENSORS
from moqe.methods.distill import Student, Targets, TrainingSet
from moqe.models.decoder import Decoder
from moqe.models.device import product_dtype
from moqe.models.shared import open_shared
from moqe.progress import Progress
from moqe.store import read_json, write_json
from moqe.tasks.distiller import validation_rows

NOTHING_TO_WIN = 0.004  # nats of divergence below which no specialist is trained: it could win a part of that at most
_SPARE = 1.2  # of the time that a specialist took, so that one more than planned is trained
_LATE = 0.5  # a width is not begun with less than this share of its time left


class Bench:
    """Measures widths of one base on one sample.

    bits: every width that is quantized. routed: what the router calls the scored windows. text_weight: of the text
    in what is followed. own_weight: how much oftener a specialist sees its own windows. work: a folder that may be
    thrown away afterwards. clock: keeps the time, and is told what was spent on what.
    """

    def __init__(
        self,
        decoder: Decoder,
        samples: AdviceSamples,
        routed: NDArray[np.str_],
        bits: Sequence[int],
        text_weight: float,
        own_weight: float,
        seed: int,
        work: Path,
        clock: Clock,
        progress: Progress,
    ) -> None:
        self.work, self.seed, self.clock, self.progress = work, seed, clock, progress
        self.own_weight = own_weight
        shared, calibration, scored = work / "shared", samples.calibration, samples.scored
        write_shared(decoder.folder, shared)
        write_json(shared / "config.json", read_json(decoder.folder / "config.json"))
        seen = calibration.select(calibration.spread(STATISTICS_WINDOWS))
        device = str(decoder.device)
        dtype = product_dtype(device, FULL.precision)
        self.codes = make_codes(decoder, seen, bits, work / "codes", shared, clock.seconds, progress, dtype)
        clock.lap("codes")
        self._skeleton: nn.Module = open_shared(shared, shared / SHARED_TENSORS, device).model
        options = FULL.model_copy(update={"validation_windows": VALIDATION_WINDOWS})
        train, validation = validation_rows(calibration, options, seed)
        targets = replace(Targets.of(decoder, calibration.tokens, dtype, progress), text_weight=text_weight)
        self.data = TrainingSet(calibration.tokens, calibration.domain, targets, train, validation)
        answers = Targets.of(decoder, scored.tokens, progress=progress)
        self.scored = Scored(
            scored.tokens,
            np.array(scored.domain),
            routed,
            np.array(scored.document),
            np.arange(len(scored)) >= len(samples.choice),
            answers,
            base_losses(self._student(bits[-1]), answers, scored.tokens),
            dtype,
            by_text=text_weight > 0,
        )
        clock.lap("base")

    def _student(self, bits: int) -> Student:
        return Student(self._skeleton, open_expert(self.codes.folders[bits]))

    def measure(
        self, wanted: Sequence[int], specialists: int, steps: int | None
    ) -> tuple[Schedule, list[Width], list[str]]:
        """Measure every width in what time is left: the schedule, the widths by bits, and what was left out, in words.

        Specialists are trained at the widths `wanted` where there is something to win, most bits first; with the text
        to follow there is at every one.
        """
        step_seconds, score_seconds = pace(self._student(min(self.codes.folders)), self.data, self.scored)
        before = {bits: choice_divergence(self._student(bits), self.scored) for bits in self.codes.folders}
        training = [
            bits for bits in sorted(wanted, reverse=True) if self.scored.by_text or before[bits] >= NOTHING_TO_WIN
        ]
        windows = len(self.scored.tokens)
        rest = (len(before) - len(training)) * windows * score_seconds
        schedule = plan(self.clock.left - rest, len(training), specialists, windows, step_seconds, score_seconds, steps)
        widths = [
            untrained(self._student(bits), bits, self.codes.methods[bits], self.scored, before[bits])
            for bits in sorted(set(before) - set(training))
        ]
        left_out, measured = list[str](), list[Width]()
        need = schedule.seconds(step_seconds, score_seconds, windows)
        bounded = steps is None
        for number, bits in enumerate(training):
            started = self.clock.used
            if number and bounded and self.clock.left < _LATE * need:
                left_out.append(f"{bits} bits: not measured, time was up")
                continue
            last = number == len(training) - 1
            found = self._train(
                bits, before[bits], schedule, specialists, partial(self._go_on, schedule, bounded, last)
            )
            widths.append(found)
            need = max(need, self.clock.used - started)
            measured.append(found)
        self.clock.lap("measure")
        most = max([schedule.specialists, *(len(width.specialists) for width in widths)])
        schedule = replace(schedule, specialists=most)
        for width in measured:
            if len(width.specialists) < most:
                made = f"{width.bits} bits: {len(width.specialists)} of {most} specialists"
                left_out.append(f"{made}, time was up or no text that was looked at was theirs")
        return schedule, sorted(widths, key=lambda width: width.bits), left_out

    def _go_on(self, schedule: Schedule, bounded: bool, last: bool, made: int, seconds: float) -> bool:
        """Whether to train another specialist after `made`, the last of which took `seconds`.

        Those that were planned as long as as much time is left; more than that only at the last width, with some over.
        """
        if not bounded:
            return True
        if made < schedule.specialists:
            return self.clock.left >= seconds
        return last and self.clock.left >= _SPARE * seconds

    def _train(
        self, bits: int, before: float, schedule: Schedule, most: int, go_on: Callable[[int, float], bool]
    ) -> Width:
        return trained(
            self._student(bits),
            bits,
            self.codes.methods[bits],
            self.data,
            self.scored,
            schedule,
            before,
            self.own_weight,
            self.seed,
            self.work / "training" / f"w{bits}",
            most,
            go_on,
            self.progress,
        )
