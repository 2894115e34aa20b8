"""`moqe bench`: latency, rates and memory of everything in a mixture, side by side, in one run."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from moqe.progress import Progress, Silent
from moqe.speed.contestants import MIXTURE, check_runtime, contestants
from moqe.speed.machine import machine
from moqe.speed.memory import measure_resident
from moqe.speed.timing import Percentiles, take_turns


@dataclass(frozen=True)
class Line:
    """One contestant.

    latency: seconds of a whole answer. first_token: seconds up to the first token of one. prefill_rate, decode_rate:
    tokens a second. resident_bytes: what a process grows by that opens the mixture and lets it answer once. None where
    it does not apply or was not measured.
    """

    name: str
    kind: str
    runtime: str
    latency: Percentiles
    first_token: Percentiles | None
    prefill_rate: float | None
    decode_rate: float | None
    resident_bytes: int | None


@dataclass(frozen=True)
class Bench:
    """A measurement: what was asked (texts: tokens of a prompt and of an answer), where, and a line a contestant."""

    folder: str
    prompt_tokens: int
    new_tokens: int
    requests: int
    machine: Mapping[str, str]
    lines: tuple[Line, ...]


def bench(
    folder: Path | str,
    *,
    runtime: str | None = None,
    prompt_tokens: int = 256,
    new_tokens: int = 64,
    requests: int = 20,
    threads: int | None = None,
    memory: bool = True,
    progress: Progress | None = None,
) -> Bench:
    """Measure every expert of a mixture, its router and itself, taking turns in one process.

    runtime: `packed`, `packed-float32`, `packed-compiled` or `llama.cpp`, for which integer experts are exported to
    GGUF; `onnx` for images; by default GGUF experts run in llama.cpp and others packed. prompt_tokens, new_tokens: of a
    text's request; images have none. requests: measured answers of each. threads: of one answer, by default torch's
    number. memory: also start a process for each contestant to see what it takes.
    Raises MoqeError for the reference runtime, whose speed says nothing, and for one the task has not; MissingExtra
    without the package of a runtime.
    """
    place, shown = Path(folder), progress or Silent()
    check_runtime(place, runtime)
    before = torch.get_num_threads()
    used = threads or before
    torch.set_num_threads(used)
    try:
        with tempfile.TemporaryDirectory() as work:
            everybody = contestants(place, runtime, Path(work), prompt_tokens, new_tokens, shown)
            with shown.track("answer", len(everybody) * (requests + 1)) as advance:
                times = take_turns(everybody, requests, advance)
            resident: dict[str, int | None] = {}
            if memory:
                with shown.track("measure memory", len(everybody)) as advance:
                    for name in (contestant.name for contestant in everybody):
                        asked = [other.name for other in everybody if name in (other.name, MIXTURE)]
                        resident[name] = measure_resident(
                            place, runtime, Path(work), prompt_tokens, new_tokens, used, asked
                        )
                        advance(1)
    finally:
        torch.set_num_threads(before)
    lines = tuple(
        Line(
            contestant.name,
            contestant.kind,
            contestant.runtime,
            Percentiles.of(found.answers),
            found.first_token,
            found.prefill_rate(prompt_tokens),
            found.decode_rate,
            resident.get(contestant.name),
        )
        for contestant, found in zip(everybody, times, strict=True)
    )
    return Bench(str(place), prompt_tokens, new_tokens, requests, machine(used), lines)
