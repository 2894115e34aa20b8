"""What 8-bit integers gain on this machine: a few convolutions in ONNX Runtime, int8 against float32."""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from moqe.formats.onnx_graph import INPUT, IR_VERSION, OPSET, OUTPUT, Graph, require_onnx
from moqe.formats.onnx_nodes import add_quantizer, add_weight
from moqe.methods.vision.layer import Uniform, WeightCodes
from moqe.runtimes.onnx import OnnxRuntime

CHANNELS, SIZE, LAYERS = 64, 56, 4  # a stage of ResNet-50


def int8_gain(seconds: float = 1.0, threads: int = 1) -> float:
    """How many times faster int8 is than float32 on 3x3 convolutions, one image at a time.

    seconds: how long to measure; both take turns. Raises MissingExtra without onnx and onnxruntime.
    """
    image = torch.randn(1, CHANNELS, SIZE, SIZE, generator=torch.Generator().manual_seed(0)).relu()
    with tempfile.TemporaryDirectory() as folder:
        runtimes = []
        for quantized in (False, True):
            path = Path(folder) / f"{quantized}.onnx"
            path.write_bytes(_convolutions(quantized).SerializeToString())
            runtimes.append(OnnxRuntime(path, threads))
    for runtime in runtimes:
        runtime.logits(image)
    ratios: list[float] = []
    end = time.perf_counter() + seconds
    while not ratios or time.perf_counter() < end:
        taken = []
        for runtime in runtimes:
            start = time.perf_counter()
            runtime.logits(image)
            taken.append(time.perf_counter() - start)
        ratios.append(taken[0] / taken[1])
    return statistics.median(ratios)


def _convolutions(quantized: bool) -> Any:
    """Convolutions and ReLUs, one after the other."""
    helper, kind = require_onnx("measuring int8").helper, require_onnx("measuring int8").TensorProto.FLOAT
    shape = ["batch", CHANNELS, SIZE, SIZE]
    ends = [helper.make_tensor_value_info(name, kind, shape) for name in (INPUT, OUTPUT)]
    model = helper.make_model(
        helper.make_graph([], "convolutions", ends[:1], ends[1:]),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
    )
    graph, value = Graph.of(model), INPUT
    random = torch.Generator().manual_seed(1)
    for index in range(LAYERS):
        layer = f"layer{index}"
        codes = torch.randint(-127, 128, (CHANNELS, CHANNELS, 3, 3), generator=random).to(torch.int8)
        weight = WeightCodes(codes, torch.full((CHANNELS,), 2.0**-11), 0, 8)
        if quantized:
            value = add_quantizer(graph, f"{layer}.input", value, Uniform(2.0**-5, 0, 8), CHANNELS)
            factors = add_weight(graph, layer, weight, transposed=False)
        else:
            factors = graph.constant(f"{layer}.weight", weight.dequantize().numpy())
        value = graph.add("Conv", [value, factors], f"{layer}.sum", pads=[1, 1, 1, 1])
        value = graph.add("Relu", [value], f"{layer}.result")
    if quantized:
        value = add_quantizer(graph, "result", value, Uniform(2.0**-5, 0, 8), CHANNELS)
    graph.add("Identity", [value], OUTPUT)
    return graph.finish()
