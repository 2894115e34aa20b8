"""A mixture of four experts of SmolLM2-135M against one of them: latency, first answer, resident memory.

Each round times the mixture, the expert it chooses, and that expert once more: what the last two differ by is what the
machine's other tenants make of equal work. Processor time does not count waiting for them.

    python -m benchmarks.latency_mixture cold|memory MIXTURE RUNTIME THREADS EXPERT...

is the process of its own that `benchmarks.latency` starts to see how long the first answer takes and how much memory
experts hold; it prints a number.
"""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.interleaved import Spread, pairwise, seconds_per_round
from benchmarks.language_models import build_mixture, write_bfloat16
from benchmarks.tables import table
from moqe.formats import open_expert
from moqe.formats.compressed_tensors import SHARED_TENSORS
from moqe.mixture import LanguageMixture, load
from moqe.models.shared import open_shared
from moqe.runtimes.texts import TEXT_RUNTIMES
from moqe.speed.machine import machine
from moqe.speed.memory import resident_bytes

PROMPT, NEW, COLD_PROMPT = 256, 64, 64
ROUNDS, COLD_ROUNDS = 31, 21  # one call each a round: what choosing adds is less than the noise of a few rounds
_CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}


def prompt_of(length: int) -> Tensor:
    """Some token ids, (length,)."""
    return torch.arange(1, length + 1) * 7 % 2000 + 100


def measure(
    folder: Path, threads: int, rounds: int, seconds_per_turn: float, smollm2: Path | None = None
) -> dict[str, Any]:
    """Everything, ready for JSON. folder: keeps the files. smollm2: a folder of SmolLM2-135M, which this is about."""
    if smollm2 is None:
        raise SystemExit("the mixture that is timed is one of SmolLM2-135M: give its folder, --smollm2")
    torch.set_num_threads(threads)
    write_bfloat16(smollm2, folder / "base")
    place, prompt = build_mixture(folder / "base", folder / "mixture"), prompt_of(PROMPT)
    mixture = load(place, runtime="packed")
    assert isinstance(mixture, LanguageMixture)
    decision = mixture.route(prompt)
    if "constant" in decision.reason:
        raise SystemExit(f"{place}: the router is a constant ({decision.reason}): remove the folder to make it anew")
    chosen = decision.expert

    def alone() -> object:
        return mixture.generate(prompt, expert=chosen, max_new_tokens=NEW)

    times = _times({"mixture": lambda: mixture.generate(prompt, max_new_tokens=NEW), "expert": alone, "again": alone})
    router = seconds_per_round({"router": lambda: mixture.route(prompt)}, rounds, seconds_per_turn)["router"]
    starts: dict[str, list[str]] = {"mixture": [], "expert": [chosen]}
    cold: dict[str, list[float]] = {name: [] for name in starts}
    order = random.Random(0)
    for _ in range(COLD_ROUNDS):
        for name in order.sample(list(starts), len(starts)):
            cold[name].append(_process("cold", place, threads, starts[name]))
    experts = list(mixture.experts)
    four, one = (_process("memory", place, threads, names) for names in (experts, experts[:1]))
    expert_seconds = Spread.of(times["wall"]["expert"]).median
    return {
        "machine": machine(threads),
        "pairs": {
            clock: {
                name: asdict(Spread.of_median(pairwise(found[name], found["expert"]))) for name in ("mixture", "again")
            }
            for clock, found in times.items()
        },
        "fastest": {name: min(found) / min(times["wall"]["expert"]) for name, found in times["wall"].items()},
        "expert_seconds": asdict(Spread.of(times["wall"]["expert"])),
        "router_milliseconds": asdict(Spread.of([1e3 * s for s in router])),
        "router_over_expert": asdict(Spread.of([s / expert_seconds for s in router])),
        "cold_seconds": {name: asdict(Spread.of(found)) for name, found in cold.items()},
        "cold_mixture_over_expert": asdict(Spread.of_median(pairwise(cold["mixture"], cold["expert"]))),
        "resident_bytes": {"four": four, "one": one},
        "four_over_four_times_one": four / (4 * one),
    }


def _times(calls: dict[str, Callable[[], object]]) -> dict[str, dict[str, list[float]]]:
    """Seconds of every call in every round by either clock; the order is drawn for every round."""
    found: dict[str, dict[str, list[float]]] = {clock: {name: [] for name in calls} for clock in _CLOCKS}
    for call in calls.values():
        call()  # caches, pages, thread pools
    order = random.Random(0)
    for _ in range(ROUNDS):
        for name in order.sample(list(calls), len(calls)):
            before = {clock: read() for clock, read in _CLOCKS.items()}
            calls[name]()
            for clock, read in _CLOCKS.items():
                found[clock][name].append(read() - before[clock])
    return found


def _process(what: str, folder: Path, threads: int, experts: Sequence[str]) -> float:
    command = [sys.executable, "-m", __name__, what, str(folder), "packed", str(threads), *experts]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def report(found: dict[str, Any]) -> str:
    """The section of docs/performance.md."""
    stated = ", ".join(f"{key} {value}" for key, value in found["machine"].items())
    pairs, mib = found["pairs"], 2**20

    def cells(name: str) -> list[str]:
        return [
            Spread(**pairs["wall"][name]).interval(3),
            f"{found['fastest'][name]:.3f}",
            Spread(**pairs["processor"][name]).interval(3),
        ]

    times = [["mixture", *cells("mixture")], ["the same expert once more", *cells("again")]]
    rows = [
        ["expert, s", Spread(**found["expert_seconds"]).text()],
        ["router, ms", Spread(**found["router_milliseconds"]).text(2)],
        ["router / expert", Spread(**found["router_over_expert"]).text(4)],
        *(
            [f"first answer, new process: {name}, s", Spread(**found["cold_seconds"][name]).text()]
            for name in ("expert", "mixture")
        ),
        [
            f"the same, mixture / expert, median of {COLD_ROUNDS} pairs [95 %]",
            Spread(**found["cold_mixture_over_expert"]).interval(),
        ],
        ["resident memory, four experts, MiB", f"{found['resident_bytes']['four'] / mib:.0f}"],
        ["resident memory, one expert, MiB", f"{found['resident_bytes']['one'] / mib:.0f}"],
        ["four experts / 4 x one", f"{found['four_over_four_times_one']:.2f}"],
    ]
    header = [
        "over the expert it chooses",
        "time, median of pairs [95 %]",
        "fastest / fastest",
        "processor time [95 %]",
    ]
    return f"""
## A mixture of four 4-bit experts of SmolLM2-135M

{stated}. {PROMPT} tokens in, {NEW} out, {ROUNDS} rounds of one call each:

{table(header, times)}

{table(["what", "measured, median (smallest to largest)"], rows)}
"""


def main(arguments: Sequence[str]) -> None:
    """One measurement in a process of its own."""
    what, place, runtime, threads, *experts = arguments
    torch.set_num_threads(int(threads))
    folder, before = Path(place), resident_bytes()
    start = time.perf_counter()
    prompt = prompt_of(COLD_PROMPT)
    if what == "cold" and experts:  # the expert as if there were no mixture
        skeleton = open_shared(folder / "shared", folder / "shared" / SHARED_TENSORS).model
        expert = TEXT_RUNTIMES[runtime](skeleton, "cpu").open(open_expert(folder / "experts" / experts[0]), experts[0])
        expert.generate(prompt[None], 1)
    else:
        mixture = load(folder, runtime=runtime)
        names: list[str | None] = [*experts] or [None]
        for name in names:
            mixture.generate(prompt, expert=name, max_new_tokens=1)
    after = resident_bytes()
    if what == "cold":
        sys.stdout.write(f"{time.perf_counter() - start}\n")
        return
    assert before is not None
    assert after is not None
    sys.stdout.write(f"{after - before}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
