from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import split_experts
from moqe.formats.compressed_tensors import SHARED_TENSORS
from moqe.formats.compressed_tensors_files import CompressedTensorsFiles
from moqe.runtimes.resident import Resident, resident_bytes
from moqe.schemes import scheme
from split_experts import surroundings, write_experts


def formula(folder: Path) -> Resident:
    experts = {path.name: CompressedTensorsFiles(path) for path in sorted(folder.glob("e?"))}
    return resident_bytes(folder / "shared" / SHARED_TENSORS, experts)


def test_the_formula_counts_codes_once(tmp_path: Path) -> None:
    base = surroundings(tmp_path / "base")
    write_experts(tmp_path, base, scheme("w4a16", group_size=64, symmetric=False), 3)
    attention, mlp = 128 * 2 * (256 + 128), 128 * 3 * 192  # q and o of two heads, k and v of one; gate, up, down
    linears = 2 * (attention + mlp)
    expected = formula(tmp_path)
    assert expected.shared == 4 * (128 * 128 + 128)
    assert expected.codes == linears // 2 + linears // 64 // 2
    norms = 2 * 4 * 128  # of inputs, attention's inputs, queries and keys
    assert expected.own == dict.fromkeys(("e0", "e1", "e2"), 2 * linears // 64 + 4 * norms)
    assert expected.working == 4 * 128 * 256  # q
    parts = expected.shared + expected.codes + 3 * expected.own["e0"] + expected.objects + expected.working
    assert expected.total == parts
    shutil.rmtree(tmp_path / "e1")
    shutil.copytree(tmp_path / "e0", tmp_path / "e1")  # a copy has its own codes
    assert formula(tmp_path).codes == 2 * expected.codes


def test_scales_in_common_are_counted_once(tmp_path: Path) -> None:
    base = surroundings(tmp_path / "base")
    paths = write_experts(tmp_path, base, scheme("w4a16", group_size=64), 2)
    before = formula(tmp_path)
    scales = "scales-00002-of-00003.safetensors"
    (paths[1] / scales).unlink()
    os.link(paths[0] / scales, paths[1] / scales)
    norms = 4 * 4 * 128
    assert before.own["e1"] == before.own["e0"]
    assert formula(tmp_path).own == {"e0": before.own["e0"], "e1": (before.own["e1"] - 2 * norms) // 2 + 2 * norms}


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four code-sharing experts of 100 million weights."""
    folder = tmp_path_factory.mktemp("large")
    base = surroundings(folder / "base", hidden_size=2048, intermediate_size=8192, num_hidden_layers=2, head_dim=128)
    write_experts(folder, base, scheme("w4a16", group_size=64), 1)

    def link_codes(source: str, target: str) -> None:
        (os.link if "codes-" in source else shutil.copyfile)(source, target)

    for number in (1, 2, 3):
        shutil.copytree(folder / "e0", folder / f"e{number}", copy_function=link_codes)
    return folder


def measure(folder: Path, *arguments: str) -> list[int]:
    """Resident bytes before the first expert and after each, in a process of their own."""
    command = [sys.executable, split_experts.__file__, str(folder), *arguments]
    done = subprocess.run(command, capture_output=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    sizes: list[int] = json.loads(done.stdout)
    return sizes


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's account of memory")
def test_four_experts_hold_one_set_of_codes(large: Path) -> None:
    expected = formula(large)
    grown = measure(large, "4")
    slack = 0.02 * expected.codes
    scales = sum(expected.own[name] for name in ("e1", "e2", "e3"))
    assert scales <= grown[4] - grown[1] <= scales + slack
    whole = expected.codes + sum(expected.own.values()) + expected.objects
    assert abs(grown[4] - grown[0] - whole) <= slack


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's account of memory")
def test_without_common_codes_each_expert_holds_its_own(large: Path) -> None:
    expected = formula(large)
    grown = measure(large, "2", "apart")
    assert grown[2] - grown[1] >= expected.codes
