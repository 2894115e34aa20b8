"""Latency of language experts: packed against float32 in torch and against llama.cpp.

Two models: random weights with Qwen3-0.6B's shapes and 8 of its layers, and SmolLM2-135M where its folder is given.
Experts are round-to-nearest: `int8` is w8a8, `int4` is w4a16 with groups of 32. llama.cpp runs GGUF exports of the same
weights, Q4_0 from `int4` and Q8_0 from w8a16 with groups of 32; it rounds activations to 8 bits. Embeddings and head
are bfloat16 everywhere but in float32 torch, which is transformers' own forward. Decoding is 32 tokens after a prompt
of one, prefill a prompt of 512 tokens and one token. All contestants have the same number of threads, and each has a
process of its own, in which nothing else is loaded; those whose turn it is not sleep.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.interleaved import Spread, ratios, seconds_per_round
from benchmarks.language_models import write_bfloat16, write_experts, write_random_qwen3
from benchmarks.own_process import RuntimeProcess
from benchmarks.tables import table
from moqe.formats import open_expert
from moqe.formats.compressed_tensors import SHARED_TENSORS
from moqe.models.decoder import Decoder
from moqe.models.shared import open_shared
from moqe.runtimes.llamacpp import LlamaCppRuntime
from moqe.runtimes.packed.runtime import COMPILED
from moqe.runtimes.reference import ReferenceRuntime
from moqe.runtimes.runtime import Runtime
from moqe.runtimes.texts import TEXT_RUNTIMES
from moqe.speed.machine import machine

DECODED, PROMPT = 32, 512
_RUNTIMES = {"": "packed", ", compiled": COMPILED}
THEIRS = {"int8": "q8_0", "int4": "q4_0"}  # what llama.cpp runs beside an expert of ours
OURS = {f"{expert}{ending}": (expert, runtime) for expert in THEIRS for ending, runtime in _RUNTIMES.items()}
CONTESTANTS = ("float32", *OURS, *THEIRS.values())


def _prompt(length: int) -> Tensor:
    """Some token ids, (1, length)."""
    return torch.arange(1, length + 1)[None] * 7 % 2000 + 100


def open_contestant(name: str, base: Path, folder: Path) -> Runtime:
    """One of `CONTESTANTS`, on a base and the experts that `write_experts` made of it."""
    if name == "float32":
        return ReferenceRuntime(Decoder.open(str(base)).full())
    if name not in OURS:
        return LlamaCppRuntime(folder / f"{name}.gguf", context_tokens=PROMPT + DECODED)
    expert, runtime = OURS[name]
    skeleton = open_shared(base, folder / "shared" / SHARED_TENSORS).model
    return TEXT_RUNTIMES[runtime](skeleton, "cpu").open(open_expert(folder / expert), name)


def _times(runtimes: Mapping[str, RuntimeProcess], rounds: int, seconds_per_turn: float) -> dict[str, Any]:
    """Seconds and ratios of decoding and prefill."""
    tasks: dict[str, tuple[Tensor, int]] = {"decode": (_prompt(1), DECODED), "prefill": (_prompt(PROMPT), 1)}
    found = {}
    for task, (prompt, new) in tasks.items():
        for name, runtime in runtimes.items():  # a text that ended sooner would count as faster
            if (made := len(runtime.generate(prompt, new))) != new:
                raise SystemExit(f"{task}: {name} made {made} tokens of {new}: give it another prompt")
        calls: dict[str, Callable[[], object]] = {
            name: partial(runtime.generate, prompt, new) for name, runtime in runtimes.items()
        }
        seconds = seconds_per_round(calls, rounds, seconds_per_turn)
        tokens = prompt.shape[1] + new - 1
        found[task] = {
            name: {
                "tokens_per_second": asdict(Spread.of([tokens / s for s in seconds[name]])),
                "over_float32": asdict(ratios(seconds["float32"], seconds[name])),
                **({"over_llamacpp": asdict(ratios(seconds[_beside(name)], seconds[name]))} if name in OURS else {}),
            }
            for name in runtimes
        }
    return found


def _beside(name: str) -> str:
    return THEIRS[OURS[name][0]]


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
    found["models"] = {}
    for model, place in models.items():
        write_experts(place / "base", place / "experts")
        with ExitStack() as stack:
            processes = {
                name: stack.enter_context(
                    RuntimeProcess(partial(open_contestant, name, place / "base", place / "experts"), threads)
                )
                for name in CONTESTANTS
            }
            found["models"][model] = _times(processes, rounds, seconds_per_turn)
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
    return f"""
## Latency of language experts

{stated}. Median (smallest to largest) of {found["rounds"]} interleaved rounds; ratios are made within each round.

{table(header, rows)}
"""
