"""The beginning of a network as an ONNX file of its own: from the image to the output of one layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from moqe.formats.onnx_graph import Graph, export_float_graph, require_onnx
from moqe.store import atomic


def write_onnx_until(path: Path, network: nn.Module, layer: str, image_shape: Sequence[int], thinning: int = 1) -> None:
    """Write a network up to the output of the convolution `layer`, in float32, for images of `image_shape`, (3, h, w).

    thinning: of the output's rows and columns only every so many are computed.
    Raises ModelError when the network cannot be exported, UnsupportedLayer when the layer does not run exactly once,
    MissingExtra without onnx.
    """
    onnx = require_onnx("writing an ONNX file")
    graph = Graph.of(export_float_graph(network, image_shape))
    product = graph.product_of(layer)
    for attribute in product.attribute:
        if attribute.name == "strides":
            attribute.ints[:] = [thinning * stride for stride in attribute.ints]
    value = product.output[0]
    del graph.model.graph.output[:]
    graph.model.graph.output.append(onnx.helper.make_tensor_value_info(value, onnx.TensorProto.FLOAT, None))
    with atomic(path) as partial:
        partial.write_bytes(graph.finish().SerializeToString(deterministic=True))
