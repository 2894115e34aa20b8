"""Speed and memory of a mixture: who takes turns how, what the numbers mean, and what is refused."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from mmap import mmap
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import moqe
from moqe.errors import MoqeError
from moqe.speed import Bench, bench, memory
from moqe.speed.page import bench_renderable
from moqe.speed.timing import Contestant, Percentiles, Times, take_turns


def test_everybody_takes_turns_in_changing_order() -> None:
    calls: list[str] = []

    def contestant(name: str, tokens: int) -> Contestant:
        def answer(request: int) -> int:
            calls.append(f"{name}{request}")
            return tokens

        return Contestant(name, "expert", "none", answer)

    told: list[int] = []
    found = take_turns([contestant("a", 3), contestant("b", 5)], 3, told.append)
    assert calls == ["a0", "b0", "a0", "b0", "b1", "a1", "a2", "b2"]
    assert [times.tokens for times in found] == [(3, 3, 3), (5, 5, 5)]
    assert sum(told) == 8
    assert found[0].first_token is None


def test_rates_and_percentiles() -> None:
    times = Times(answers=(1.5, 2.5), tokens=(11, 6), firsts=(0.5, 0.5))
    assert times.decode_rate == pytest.approx(15 / 3)
    assert times.prefill_rate(100) == pytest.approx(200)
    assert Times((1.0,), (0,), ()).decode_rate is None
    assert Times((1.0,), (1,), (0.9,)).decode_rate is None
    found = Percentiles.of([float(value) for value in range(101)])
    assert (found.p50, found.p90, found.p99, found.n) == (50.0, 90.0, 99.0, 101)


def test_times_are_the_calls_own() -> None:
    def answer(request: int) -> int:
        time.sleep(0.02)
        return 2

    slow = Contestant("slow", "expert", "none", answer, lambda request: time.sleep(0.005))
    quick = Contestant("quick", "expert", "none", lambda request: 2)
    (first, second) = take_turns([slow, quick], 2)
    assert all(0.02 <= seconds < 0.2 for seconds in first.answers)
    assert all(0.005 <= seconds < 0.1 for seconds in first.firsts)
    assert all(seconds < 0.01 for seconds in second.answers)


@pytest.fixture(scope="module")
def measured(built: Path) -> Bench:
    return bench(built, runtime="llama.cpp", prompt_tokens=24, new_tokens=4, requests=2, threads=1, memory=False)


def test_experts_router_and_mixture_are_measured(measured: Bench, built: Path) -> None:
    names = [line.name for line in measured.lines]
    assert names == [*moqe.load(built).experts, "router", "mixture"]
    kinds = {line.name: (line.kind, line.runtime) for line in measured.lines}
    assert kinds["gptq"] == ("expert", "llama.cpp")
    assert kinds["mixture"] == ("mixture", "llama.cpp")
    for line in measured.lines:
        assert line.latency.n == 2
        assert 0 < line.latency.p50 <= line.latency.p90 <= line.latency.p99
        assert line.resident_bytes is None
        if line.kind == "router":
            assert line.first_token is None
        else:
            assert line.first_token is not None
            assert line.prefill_rate == pytest.approx(24 / line.first_token.p50)
    assert measured.machine["threads"] == "1"
    assert measured.machine["torch"] == torch.__version__
    assert json.loads(json.dumps(asdict(measured)))["requests"] == 2


def test_the_table_names_everything(measured: Bench) -> None:
    console = Console(width=140, record=True)
    console.print(bench_renderable(measured))
    said = console.export_text()
    for word in ("gptq", "smooth", "mixture", "llama.cpp", "24 tokens in", "threads 1", "p99"):
        assert word in said


def test_threads_are_put_back(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def watch(*asked: Any) -> list[Contestant]:
        seen.append(torch.get_num_threads())
        raise MoqeError("enough")

    monkeypatch.setattr("moqe.speed.run.contestants", watch)
    with pytest.raises(MoqeError, match="enough"):
        bench(built, runtime="llama.cpp", threads=2)
    assert (seen, torch.get_num_threads()) == ([2], 1)


@pytest.mark.parametrize("runtime", ["reference", "bfloat16"])
def test_the_judge_is_not_timed(built: Path, runtime: str) -> None:
    with pytest.raises(MoqeError, match="its latency and memory say nothing"):
        bench(built, runtime=runtime)


def test_runtimes_of_another_task_are_refused(built: Path) -> None:
    with pytest.raises(MoqeError, match="no runtime 'onnx' for language"):
        bench(built, runtime="onnx")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="only Linux says what is resident")
def test_memory_is_that_of_the_process(built: Path, tmp_path: Path) -> None:
    with mmap(-1, 30 << 20) as held:  # pages of its own, which no allocator keeps for later
        held.write(bytes([1]) * len(held))
        before = memory.resident_bytes()
    after = memory.resident_bytes()
    assert before is not None
    assert after is not None
    assert before - after > 20 << 20
    found = memory.measure_resident(built, "llama.cpp", tmp_path, 24, 4, 1, ["kq"])
    assert found is not None
    assert 1 << 20 < found < 1 << 30


def test_a_failing_process_is_named(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(MoqeError, match="memory of kq could not be measured"):
        memory.measure_resident(built, "llama.cpp", tmp_path, 24, 4, 1, ["kq"])
