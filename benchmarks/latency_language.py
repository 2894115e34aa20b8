"""Latency of language experts: packed against float32 in torch and against llama.cpp; a mixture against one expert.

Two models: random weights with Qwen3-0.6B's shapes and 8 of its layers, and SmolLM2-135M where its folder is given.
Experts are round-to-nearest: `int8` is w8a8, `int4` is w4a16 with groups of 32. llama.cpp runs GGUF exports of the same
weights, Q4_0 from `int4` and Q8_0 from w8a16 with groups of 32; it rounds activations to 8 bits. Embeddings and head
are bfloat16 everywhere but in float32 torch, which is transformers' own forward. Decoding is 32 tokens after a prompt
of one, prefill a prompt of 512 tokens and one token. All contestants have the same number of threads.

    python -m benchmarks.latency_language cold|memory MIXTURE RUNTIME THREADS EXPERT...

is the process of its own that the main one starts to see how long the first answer takes and how much memory experts
hold; it prints a number.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.interleaved import Spread, pairwise, ratios, seconds_per_round
from benchmarks.language_models import build_mixture, write_bfloat16, write_experts, write_random_qwen3
from benchmarks.tables import table
from moqe.formats import open_expert
from moqe.formats.compressed_tensors import SHARED_TENSORS
from moqe.mixture import LanguageMixture, load
from moqe.models.decoder import Decoder
from moqe.models.shared import open_shared
from moqe.runtimes.llamacpp import LlamaCppRuntime
from moqe.runtimes.reference import ReferenceRuntime
from moqe.runtimes.runtime import Runtime
from moqe.runtimes.texts import TEXT_RUNTIMES
from moqe.speed.machine import machine
from moqe.speed.memory import resident_bytes

DECODED, PROMPT = 32, 512
PAIRS = {"int8": "q8_0", "int4": "q4_0"}  # packed against llama.cpp
MIXTURE_PROMPT, MIXTURE_NEW = 256, 64
MIXTURE_ROUNDS = 31  # one call each a round: what choosing adds is less than the noise of a few rounds
COLD_ROUNDS = 9


def _prompt(length: int) -> Tensor:
    """Some token ids, (1, length)."""
    return torch.arange(1, length + 1)[None] * 7 % 2000 + 100


def _contestants(base: Path, folder: Path) -> dict[str, Runtime]:
    """float32 torch, and both kinds of runtime on both kinds of expert."""
    paths = write_experts(base, folder)
    skeleton = open_shared(base, folder / "shared" / SHARED_TENSORS).model
    packed = TEXT_RUNTIMES["packed"](skeleton, "cpu")
    found: dict[str, Runtime] = {"float32": ReferenceRuntime(Decoder.open(str(base)).full())}
    for ours, theirs in PAIRS.items():
        found[ours] = packed.open(open_expert(paths[ours]), ours)
        found[theirs] = LlamaCppRuntime(paths[f"{theirs}.gguf"], context_tokens=PROMPT + DECODED)
    return found


def _times(runtimes: dict[str, Runtime], rounds: int, seconds_per_turn: float) -> dict[str, Any]:
    """Seconds and ratios of decoding and prefill."""
    tasks: dict[str, tuple[Tensor, int]] = {"decode": (_prompt(1), DECODED), "prefill": (_prompt(PROMPT), 1)}
    found = {}
    for task, (prompt, new) in tasks.items():
        calls: dict[str, Callable[[], object]] = {
            name: lambda runtime=runtime: runtime.generate(prompt, new)  # noqa: B023
            for name, runtime in runtimes.items()
        }
        seconds = seconds_per_round(calls, rounds, seconds_per_turn)
        tokens = prompt.shape[1] + new - 1
        found[task] = {
            name: {
                "tokens_per_second": asdict(Spread.of([tokens / s for s in seconds[name]])),
                "over_float32": asdict(ratios(seconds["float32"], seconds[name])),
                **({"over_llamacpp": asdict(ratios(seconds[PAIRS[name]], seconds[name]))} if name in PAIRS else {}),
            }
            for name in runtimes
        }
    return found


def _mixture(folder: Path, threads: int, rounds: int, seconds_per_turn: float) -> dict[str, Any]:
    """A mixture against the expert it chooses, its first answer against a single expert's, and memory."""
    mixture, prompt = load(folder, runtime="packed"), _prompt(MIXTURE_PROMPT)
    assert isinstance(mixture, LanguageMixture)
    decision = mixture.route(prompt[0])
    if "constant" in decision.reason:
        raise SystemExit(f"{folder}: the router is a constant ({decision.reason}): remove the folder to make it anew")
    chosen = decision.expert
    calls: dict[str, Callable[[], object]] = {
        "mixture": lambda: mixture.generate(prompt[0], max_new_tokens=MIXTURE_NEW),
        "expert": lambda: mixture.generate(prompt[0], expert=chosen, max_new_tokens=MIXTURE_NEW),
    }
    seconds = seconds_per_round(calls, MIXTURE_ROUNDS, 0.0)
    router = seconds_per_round({"router": lambda: mixture.route(prompt[0])}, rounds, seconds_per_turn)["router"]
    alone = Spread.of(seconds["expert"]).median
    cold: dict[str, list[float]] = {"mixture": [], "expert": []}
    for _ in range(COLD_ROUNDS):
        cold["mixture"].append(_alone("cold", folder, threads, []))
        cold["expert"].append(_alone("cold", folder, threads, [chosen]))
    experts = list(mixture.experts)
    four, one = (_alone("memory", folder, threads, names) for names in (experts, experts[:1]))
    return {
        "milliseconds": {
            name: asdict(Spread.of([1e3 * s for s in found])) for name, found in {**seconds, "router": router}.items()
        },
        "mixture_over_expert": asdict(Spread.of_median(pairwise(seconds["mixture"], seconds["expert"]))),
        "router_over_expert": asdict(Spread.of([s / alone for s in router])),
        "cold_seconds": {name: asdict(Spread.of(found)) for name, found in cold.items()},
        "cold_mixture_over_expert": asdict(ratios(cold["mixture"], cold["expert"])),
        "resident_bytes": {"four": four, "one": one},
        "four_over_four_times_one": four / (4 * one),
    }


def _alone(what: str, folder: Path, threads: int, experts: Sequence[str]) -> float:
    command = [sys.executable, "-m", __name__, what, str(folder), "packed", str(threads), *experts]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def measure(
    folder: Path, threads: int, rounds: int, seconds_per_turn: float, smollm2: Path | None = None
) -> dict[str, Any]:
    """Everything, ready for JSON. folder: keeps the files. smollm2: a folder of SmolLM2-135M."""
    torch.set_num_threads(threads)
    write_random_qwen3(folder / "qwen3" / "base")
    found: dict[str, Any] = {"machine": machine(threads), "rounds": rounds}
    models = {"Qwen3-0.6B, 8 layers": folder / "qwen3"}
    if smollm2 is not None:
        write_bfloat16(smollm2, folder / "smollm2" / "base")
        models["SmolLM2-135M"] = folder / "smollm2"
    found["models"] = {
        name: _times(_contestants(place / "base", place / "experts"), rounds, seconds_per_turn)
        for name, place in models.items()
    }
    if smollm2 is not None:
        mixture = build_mixture(folder / "smollm2" / "base", folder / "smollm2" / "mixture")
        found["mixture"] = _mixture(mixture, threads, rounds, seconds_per_turn)
    return found


def report(found: dict[str, Any]) -> str:
    """The section of docs/performance.md."""
    rows = [
        [
            model,
            task,
            name,
            Spread(**numbers["tokens_per_second"]).text(0),
            Spread(**numbers["over_float32"]).text(),
            Spread(**numbers["over_llamacpp"]).text() if "over_llamacpp" in numbers else "",
        ]
        for model, tasks in found["models"].items()
        for task, contestants in tasks.items()
        for name, numbers in contestants.items()
    ]
    header = ["model", "task", "contestant", "tokens/s", "speed / float32 torch", "speed / llama.cpp"]
    stated = ", ".join(f"{key} {value}" for key, value in found["machine"].items())
    text = f"""
## Latency of language experts

{stated}. Median (smallest to largest) of {found["rounds"]} interleaved rounds; ratios are made within each round.

{table(header, rows)}
"""
    if "mixture" not in found:
        return text
    mixture, mib = found["mixture"], 2**20
    times = [
        [
            f"mixture / its expert, {MIXTURE_PROMPT} tokens in, {MIXTURE_NEW} out, {MIXTURE_ROUNDS} pairs [95 %]",
            Spread(**mixture["mixture_over_expert"]).interval(3),
        ],
        ["router, ms", Spread(**mixture["milliseconds"]["router"]).text(2)],
        ["router / expert", Spread(**mixture["router_over_expert"]).text(4)],
        ["first answer, new process: mixture / one expert", Spread(**mixture["cold_mixture_over_expert"]).text()],
        ["resident memory, four experts, MiB", f"{mixture['resident_bytes']['four'] / mib:.0f}"],
        ["resident memory, one expert, MiB", f"{mixture['resident_bytes']['one'] / mib:.0f}"],
        ["four experts / 4 x one", f"{mixture['four_over_four_times_one']:.2f}"],
    ]
    return f"{text}\nA mixture of four 4-bit experts of SmolLM2-135M:\n\n{table(['what', 'measured'], times)}\n"


def main(arguments: Sequence[str]) -> None:
    """One measurement in a process of its own."""
    what, place, runtime, threads, *experts = arguments
    torch.set_num_threads(int(threads))
    folder, before = Path(place), resident_bytes()
    start = time.perf_counter()
    prompt = _prompt(64)
    if what == "cold" and experts:  # the expert as if there were no mixture
        skeleton = open_shared(folder / "shared", folder / "shared" / SHARED_TENSORS).model
        expert = TEXT_RUNTIMES[runtime](skeleton, "cpu").open(open_expert(folder / "experts" / experts[0]), experts[0])
        expert.generate(prompt, 1)
    else:
        mixture = load(folder, runtime=runtime)
        for name in experts or [None]:
            mixture.generate(prompt[0], expert=name, max_new_tokens=1)
    after = resident_bytes()
    if what == "cold":
        sys.stdout.write(f"{time.perf_counter() - start}\n")
        return
    assert before is not None
    assert after is not None
    sys.stdout.write(f"{after - before}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
