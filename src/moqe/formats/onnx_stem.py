"""The beginning of a network as an ONNX file of its own: from the image to the output of one layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from moqe.formats.onnx_graph import Graph, export_float_graph, require_onnx
from moqe.store import atomic


def write_onnx_until(path: Path, network: nn.Module, layer: str, image_shape: Sequence[int]) -> None:
    """Write a network up to the output of `layer`, in float32, for images of `image_shape`, (3, h, w).

    Raises ModelError when the network cannot be exported, UnsupportedLayer when the layer does not run exactly once,
    MissingExtra without onnx.
    """
    onnx = require_onnx("writing an ONNX file")
    graph = Graph.of(export_float_graph(network, image_shape))
    value = graph.product_of(layer).output[0]
    (bias,) = [node for node in graph.consumers(value) if _adds_a_constant(graph, node)] or [None]
    if bias is not None:  # an exporter may write a layer's bias as an addition
        value = bias.output[0]
    del graph.model.graph.output[:]
    graph.model.graph.output.append(onnx.helper.make_tensor_value_info(value, onnx.TensorProto.FLOAT, None))
    with atomic(path) as partial:
        partial.write_bytes(graph.finish().SerializeToString(deterministic=True))


def _adds_a_constant(graph: Graph, node: object) -> bool:
    return getattr(node, "op_type", "") == "Add" and any(graph.array(name) is not None for name in node.input)  # type: ignore[attr-defined]
