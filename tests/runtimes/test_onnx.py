"""ONNX Runtime computes what the reference network computes, in integers where the file allows it."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from moqe.errors import CheckpointError, DataError, MissingExtra, NumericalError
from moqe.formats.onnx_biases import integer_biases
from moqe.formats.onnx_graph import OPSET, Graph
from moqe.formats.onnx_nodes import add_quantizer
from moqe.formats.onnx_writer import write_onnx_expert
from moqe.methods.vision.layer import BlockFloat, InputQuantizer, QuantizedLayer, Uniform
from moqe.methods.vision.network import quantize_network
from moqe.runtimes import onnx as onnx_runtime
from moqe.runtimes.onnx import OnnxRuntime
from onnx_networks import IMAGE_SHAPE, codes, images, quantized_layers, small_net, thresholds, uniform, write

onnx: Any = pytest.importorskip("onnx")
ort: Any = pytest.importorskip("onnxruntime")

EXECUTED = {
    ("uniform", 8): {"integer": 8, "float": 0},
    ("uniform", 4): {"integer": 8, "float": 0},
    ("thresholds", 8): {"integer": 3, "float": 5},
    ("thresholds", 4): {"integer": 3, "float": 5},
    ("block_float", 8): {"integer": 0, "float": 8},
    ("block_float", 4): {"integer": 0, "float": 8},
}


@pytest.mark.parametrize(("kind", "bits"), EXECUTED)
def test_agrees_with_the_reference_network(kind: str, bits: int, tmp_path: Path) -> None:
    layers = integer_biases(quantized_layers(kind, bits))
    runtime = OnnxRuntime(write(tmp_path / "expert.onnx", layers), threads=1)
    assert runtime.executed() == EXECUTED[kind, bits]
    x = images(96, seed=1)
    with torch.no_grad():
        expected = quantize_network(small_net(), layers)(x)
    found = runtime.logits(x)
    assert torch.equal(found.argmax(1), expected.argmax(1))
    difference = (found - expected).abs().amax(1) / (expected.max() - expected.min())
    # An activation in the middle between two codes, as float32 rounds, may get the other one.
    assert float(difference.max()) < 0.01
    assert float((difference < 1e-6).float().mean()) > 0.95


@pytest.mark.parametrize("bits", [8, 4])
def test_biases_of_channels_that_are_next_to_nothing(bits: int, tmp_path: Path) -> None:
    layers = list(quantized_layers("uniform", bits))
    index = next(i for i, layer in enumerate(layers) if layer.name == "left")
    scale, bias = layers[index].weight.scale.clone(), layers[index].bias
    assert bias is not None
    scale[0], bias = 1e-14, bias.clone()
    bias[0] = 1.0  # 10 ** 16 steps
    layers[index] = replace(layers[index], weight=replace(layers[index].weight, scale=scale), bias=bias)
    held = integer_biases(layers)
    x = images(64)
    with torch.no_grad():
        expected, as_it_was = (quantize_network(small_net(), made)(x) for made in (held, layers))
    torch.testing.assert_close(expected, as_it_was, rtol=0, atol=0.01 * float(as_it_was.abs().max()))
    found = OnnxRuntime(write(tmp_path / "expert.onnx", held), threads=1).logits(x)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_full_precision_agrees_with_torch(tmp_path: Path) -> None:
    runtime = OnnxRuntime(write(tmp_path / "base.onnx", ()), threads=1)
    x = images(5)
    with torch.no_grad():
        torch.testing.assert_close(runtime.logits(x), small_net()(x), rtol=1e-4, atol=1e-4)
    assert runtime.executed() == {"integer": 0, "float": 8}


def quantized_by_engine(quantizer: InputQuantizer, x: Tensor, optimized: bool, axis: int = 1) -> Tensor:
    """x through a quantizer's nodes in ONNX Runtime."""
    shape = ["batch", *x.shape[1:]]
    kinds = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name in ("x", "y")]
    opset = [onnx.helper.make_opsetid("", OPSET)]
    graph = Graph.of(onnx.helper.make_model(onnx.helper.make_graph([], "g", kinds[:1], kinds[1:]), opset_imports=opset))
    graph.add("Identity", [add_quantizer(graph, "layer.input", "x", quantizer, x.shape[axis])], "y")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if not optimized:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(graph.finish().SerializeToString(), options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


@pytest.mark.parametrize("optimized", [False, True])
@settings(deadline=None, max_examples=25)
@given(bits=st.integers(2, 8), signed=st.booleans(), spread=st.floats(1e-3, 1e3), seed=st.integers(0, 99))
def test_uniform_is_exact(optimized: bool, bits: int, signed: bool, spread: float, seed: int) -> None:
    x = spread * torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(seed))
    quantizer = uniform(float(x.min()) * 0.8, float(x.max()) * 0.8, bits, signed)
    x[0, 0, 0] = (torch.arange(5) + 0.5) * quantizer.scale  # ties
    assert torch.equal(quantized_by_engine(quantizer, x, optimized), quantizer(x))


@pytest.mark.parametrize("optimized", [False, True])
@settings(deadline=None, max_examples=15)
@given(bits=st.integers(1, 8), spread=st.floats(1e-3, 1e3), seed=st.integers(0, 99))
def test_thresholds_are_exact(optimized: bool, bits: int, spread: float, seed: int) -> None:
    x = spread * torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(seed))
    quantizer = thresholds(float(x.min()) * 0.8, float(x.max()) * 0.8, bits)
    assert torch.equal(quantized_by_engine(quantizer, x, optimized), quantizer(x))


@pytest.mark.parametrize("optimized", [False, True])
@settings(deadline=None, max_examples=40)
@given(
    bits=st.integers(2, 9),
    block=st.integers(1, 9),
    channels=st.integers(1, 8),
    signed=st.booleans(),
    linear=st.booleans(),
    exponent=st.integers(-110, 100),
    seed=st.integers(0, 99),
)
def test_block_float_is_exact(
    optimized: bool, bits: int, block: int, channels: int, signed: bool, linear: bool, exponent: int, seed: int
) -> None:
    shape = (2, 3, channels) if linear else (2, channels, 3, 4)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    x.view(-1)[0] = 2.0**exponent  # a power of two is its own exponent's first number,
    x.view(-1)[-1] = float(np.nextafter(np.float32(2.0**exponent), np.float32(0)))  # and this the last one before
    quantizer = BlockFloat(bits, block, signed, -1 if linear else 1)
    assert torch.equal(quantized_by_engine(quantizer, x, optimized, quantizer.axis), quantizer(x))


class Relu6Pair(nn.Module):
    """Two convolutions and a ReLU6 that cuts."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(nn.functional.relu6(self.first(x))).mean((2, 3))


@pytest.mark.parametrize("bits", [4, 8])
def test_relu6_between_convolutions_stays_in_integers(bits: int, tmp_path: Path) -> None:
    network = Relu6Pair().eval().requires_grad_(False)
    network.first.weight.mul_(20)
    reading = uniform(-3, 3, bits), uniform(0, 9.1, bits)  # the codes reach beyond 6: only the clip stops there
    layers = tuple(
        QuantizedLayer(name, codes(module.weight, 8), module.bias, quantizer)
        for (name, module), quantizer in zip(network.named_children(), reading, strict=True)
    )
    write_onnx_expert(tmp_path / "expert.onnx", network, layers, IMAGE_SHAPE)
    runtime = OnnxRuntime(tmp_path / "expert.onnx", threads=1)
    assert runtime.executed() == {"integer": 1, "float": 1}  # the last one feeds a mean in float
    x = images(64)
    difference = (runtime.logits(x) - quantize_network(network, layers)(x)).abs()
    assert float(difference.max()) < 0.02
    assert float(difference.median()) < 1e-5


def test_batches_do_not_matter(tmp_path: Path) -> None:
    path = write(tmp_path / "expert.onnx", quantized_layers("uniform", 8))
    x = images(7)
    whole = OnnxRuntime(path, threads=1).logits(x)
    assert whole.shape == (7, 5)
    torch.testing.assert_close(OnnxRuntime(path, threads=2, max_batch=3).logits(x), whole)
    assert OnnxRuntime(path).logits(x[:0]).shape == (0, 5)


def test_says_what_images_it_takes(tmp_path: Path) -> None:
    runtime = OnnxRuntime(write(tmp_path / "base.onnx", ()))
    assert runtime.image_shape == IMAGE_SHAPE
    with pytest.raises(DataError, match=r"\(n, 3, 12, 12\), not \(2, 3, 8, 8\)"):
        runtime.logits(torch.zeros(2, 3, 8, 8))


def test_logits_that_are_not_finite(tmp_path: Path) -> None:
    x = images(2)
    x[1, 0, 0, 0] = float("nan")
    with pytest.raises(NumericalError, match=r"base\.onnx"):
        OnnxRuntime(write(tmp_path / "base.onnx", ())).logits(x)


def test_files_that_do_not_run(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        OnnxRuntime(tmp_path / "missing.onnx")
    whole = write(tmp_path / "expert.onnx", ()).read_bytes()
    (tmp_path / "cut.onnx").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="cannot be run by ONNX Runtime"):
        OnnxRuntime(tmp_path / "cut.onnx")


def test_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "base.onnx", ())
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtra, match=r"pip install '\.\[vision\]'"):
        OnnxRuntime(path)


def test_processors_without_vnni_get_exact_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = quantized_layers("uniform", 8)
    path = write(tmp_path / "expert.onnx", layers)
    x = images(16)
    expected = OnnxRuntime(path, threads=1).logits(x)
    asked: list[tuple[str, str]] = []

    class Options(ort.SessionOptions):  # type: ignore[misc]
        def add_session_config_entry(self, key: str, value: str) -> None:
            asked.append((key, value))
            super().add_session_config_entry(key, value)

    monkeypatch.setattr(onnx_runtime, "has_vnni", lambda: False)
    monkeypatch.setattr(ort, "SessionOptions", Options)
    found = OnnxRuntime(path, threads=1).logits(x)
    assert asked == [("session.x64quantprecision", "1")]
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02 * float(expected.max() - expected.min()))


def test_signed_activations(tmp_path: Path) -> None:
    layers = [
        QuantizedLayer(layer.name, layer.weight, layer.bias, Uniform(layer.input.scale, 0, 8, True))
        for layer in quantized_layers("uniform", 8)
        if isinstance(layer.input, Uniform)
    ]
    runtime = OnnxRuntime(write(tmp_path / "expert.onnx", tuple(layers)), threads=1)
    x = images(64)
    with torch.no_grad():
        expected = quantize_network(small_net(), layers)(x)
    spread = float(expected.max() - expected.min())
    assert float((runtime.logits(x) - expected).abs().max()) < 0.02 * spread
