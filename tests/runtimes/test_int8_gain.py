"""The doctor's measurement of int8: real integer kernels against real float ones, or the line that installs them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from moqe.doctor import doctor
from moqe.models import processor
from moqe.runtimes import int8_gain
from moqe.runtimes.onnx import OnnxRuntime

pytest.importorskip("onnxruntime")


def test_integers_are_compared_with_floats(tmp_path: Path) -> None:
    executed = []
    for quantized in (False, True):
        path = tmp_path / f"{quantized}.onnx"
        path.write_bytes(int8_gain._convolutions(quantized).SerializeToString())
        executed.append(OnnxRuntime(path, threads=1).executed())
    assert executed == [{"integer": 0, "float": 4}, {"integer": 4, "float": 0}]
    assert int8_gain.int8_gain(seconds=0.0) > 0


def test_doctor_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    found = doctor()
    assert "pip install '.[vision]'" in found["machine"]["int8 in ONNX Runtime"]


@pytest.mark.parametrize(("flags", "expected"), [("fpu avx2", False), ("fpu avx512_vnni", True), ("avx_vnni", True)])
def test_vnni(flags: str, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text(f"processor\t: 0\nflags\t\t: {flags}\n")
    monkeypatch.setattr(processor, "_CPU_INFO", info)
    assert processor.has_vnni() == expected


def test_processors_that_say_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "_CPU_INFO", tmp_path / "missing")
    assert processor.cpu_flags() == frozenset()
    assert not processor.has_vnni()
