"""What ONNX Runtime executes in integers, method by method and scheme by scheme: the tables of docs/methods."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from small_classifier import SIDE, Setting, job

from moqe.formats.onnx_biases import integer_biases
from moqe.formats.onnx_graph import export_float_graph
from moqe.formats.onnx_writer import build_onnx_model
from moqe.methods.vision import VISION_METHODS
from moqe.runtimes.onnx import OnnxRuntime

pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def float_graph(setting: Setting) -> Any:
    """The network as it is exported, once: that takes seconds."""
    return export_float_graph(setting.network, (3, SIDE, SIDE))


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8", "w4a4"])
@pytest.mark.parametrize("method", VISION_METHODS)
def test_products_in_integers(setting: Setting, float_graph: Any, tmp_path: Path, method: str, scheme: str) -> None:
    options = {} if method == "ptq" else {"steps": 1}
    result = VISION_METHODS[method].fit(job(setting, method, scheme, **options))
    model = build_onnx_model(float_graph, setting.network, integer_biases(result.layers), {})
    path = tmp_path / "expert.onnx"
    path.write_bytes(model.SerializeToString())

    sites = len(setting.sites)
    in_float = sum(site.needs_output for site in setting.sites)  # those that feed an addition or a mean
    assert 0 < in_float < sites
    if method in ("n2uq", "dsconv"):
        in_float = sites
    elif scheme == "w8a8":
        in_float = 0
    assert OnnxRuntime(path, threads=1).executed() == {"integer": sites - in_float, "float": in_float}
