"""The beginning of a network as an ONNX file of its own: an image to its first convolution, pooled."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from moqe.formats.onnx_graph import OUTPUT, Graph, export_float_graph, require_onnx
from moqe.store import atomic


def write_onnx_stem(
    path: Path,
    network: nn.Module,
    layer: str,
    image_shape: Sequence[int],
    thinning: int,
    rows: Tensor,
    columns: Tensor,
) -> None:
    """Write a network up to the convolution `layer`, ReLU and pooling, in float32, for images (3, h, w).

    thinning: of the convolution's rows and columns only every so many are computed. rows, columns: what they are
    averaged by, (grid, rows) and (grid, columns), as a product of matrices; the file gives (b, channels * grid * grid).
    Raises ModelError when the network cannot be exported, UnsupportedLayer when the layer does not run exactly once,
    MissingExtra without onnx.
    """
    onnx = require_onnx("writing an ONNX file")
    graph = Graph.of(export_float_graph(network, image_shape))
    product = graph.product_of(layer)
    for attribute in product.attribute:
        if attribute.name == "strides":
            attribute.ints[:] = [thinning * stride for stride in attribute.ints]
    for node in graph.nodes:
        node.output[:] = ["unused" if name == OUTPUT else name for name in node.output]
    stage = graph.add("Relu", [product.output[0]], "stem.relu")
    stage = graph.add("MatMul", [graph.constant("stem.rows", rows.numpy()), stage], "stem.rows_pooled")
    stage = graph.add("MatMul", [stage, graph.constant("stem.columns", columns.T.contiguous().numpy())], "stem.pooled")
    graph.add("Flatten", [stage], OUTPUT, axis=1)
    del graph.model.graph.output[:]
    graph.model.graph.output.append(onnx.helper.make_tensor_value_info(OUTPUT, onnx.TensorProto.FLOAT, None))
    with atomic(path) as partial:
        partial.write_bytes(graph.finish().SerializeToString(deterministic=True))
