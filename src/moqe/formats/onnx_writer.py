"""Write an image expert as one ONNX file: a float graph whose listed layers hold integers.

Spec: ONNX in the QDQ form, opset 21: QuantizeLinear and DequantizeLinear around ordinary Conv, Gemm and MatMul, which
engines with integer kernels join. `metadata_props` say which initializers make up which layer, so nothing has to be
guessed from the graph when the layers are read back.

What is not obvious: the bias of a linear is added by a node of its own, because ONNX Runtime makes integer Gemms only
of those whose bias is int32, which would round it. Layers that read one value through equal quantizers share its nodes.
Equal layers give equal bytes. Cost: one export.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moqe.errors import ModelError, NumericalError, UnsupportedLayer
from moqe.formats.onnx_biases import bias_steps
from moqe.formats.onnx_graph import Graph, attributes, export_float_graph, require_onnx
from moqe.formats.onnx_nodes import add_quantizer, add_weight, same_quantizer
from moqe.methods.vision.layer import InputQuantizer, QuantizedLayer, Thresholds, Uniform
from moqe.store import atomic, canonical_json

LAYERS_KEY = "moqe.layers"


def write_onnx_expert(
    path: Path,
    network: nn.Module,
    layers: Sequence[QuantizedLayer],
    image_shape: Sequence[int],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a folded network with its quantized layers; without layers, the full-precision network itself.

    image_shape: (3, h, w). metadata: texts to keep in the file, which `read_onnx_metadata` gives back.
    Raises ModelError when the network cannot be exported or has other layers; UnsupportedLayer, naming it, for a layer
    whose product does not take the module's own weight exactly once; NumericalError for numbers that a file or an
    integer kernel cannot hold; MissingExtra without onnx.
    """
    model = build_onnx_model(export_float_graph(network, image_shape), network, layers, metadata or {})
    with atomic(path) as partial:
        partial.write_bytes(model.SerializeToString(deterministic=True))


def build_onnx_model(
    float_graph: Any, network: nn.Module, layers: Sequence[QuantizedLayer], metadata: Mapping[str, str]
) -> Any:
    """The ONNX model of a network with quantized layers, from its exported float graph, which is not changed."""
    onnx = require_onnx("writing an ONNX file")
    model = onnx.ModelProto()
    model.CopyFrom(float_graph)
    graph = Graph.of(model)
    modules = dict(network.named_modules())
    for layer in layers:
        _check(graph, layer, modules.get(layer.name))
        _check_bias_fits(layer)
    _make_room(graph, {layer.name for layer in layers})
    for layer in layers:
        _write_product(graph, layer)
    # Inputs come last: by now every value that an input quantizer reads is the one it shall read.
    quantizers = _InputQuantizers(graph)
    records = [_record(layer, quantizers.add(layer)) for layer in layers]
    finished = graph.finish()
    entries = {**metadata, LAYERS_KEY: canonical_json(records)}
    onnx.helper.set_model_props(finished, dict(sorted(entries.items())))
    return finished


def _check(graph: Graph, layer: QuantizedLayer, module: nn.Module | None) -> None:
    """Refuse a layer that is not the network's, or whose product the exporter or the network has altered."""
    if not isinstance(module, nn.Conv2d | nn.Linear):
        raise ModelError(f"the network has no convolution or linear named {layer.name!r}: open its own base model")
    if module.weight.shape != layer.weight.codes.shape:
        raise ModelError(
            f"{layer.name}: the weight has shape {tuple(module.weight.shape)} and its codes "
            f"{tuple(layer.weight.codes.shape)}: open the base model they were made from"
        )
    node = graph.product_of(layer.name)
    weight = graph.array(node.input[1])
    expected = _numpy(module.weight)
    if node.op_type == "MatMul":
        expected = expected.T
    plain = node.op_type != "Gemm" or attributes(node) == {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 1}
    if weight is None or not plain or not np.array_equal(weight, expected):
        raise UnsupportedLayer(
            f"{layer.name} does not multiply by its own weight as it is, because the network or the exporter computes "
            "with the weight first: keep this layer in full precision"
        )
    bias, own = _bias_of(graph, layer.name, node), module.bias
    nothing = own is None or not bool(own.any())  # the exporter drops a bias that is all zero
    if not (nothing if bias is None else own is not None and np.array_equal(bias, _numpy(own))):
        raise UnsupportedLayer(f"{layer.name} does not add its own bias as it is: keep this layer in full precision")


def _check_bias_fits(layer: QuantizedLayer) -> None:
    """Refuse a bias that integer kernels would cut without a word."""
    steps = bias_steps(layer)
    if layer.bias is not None and steps is not None and bool((layer.bias.abs() > 2.0**31 * steps).any()):
        raise NumericalError(
            f"{layer.name}: a bias does not fit into 32-bit steps of input scale times weight scale: pass the layers "
            "through integer_biases"
        )


def _bias_of(graph: Graph, layer: str, node: Any) -> np.ndarray[Any, Any] | None:
    if len(node.input) == 3:
        return graph.array(node.input[2])
    addition = _addition(graph, layer, node)
    return None if addition is None else graph.array(addition.input[1])


def _addition(graph: Graph, layer: str, node: Any) -> Any | None:
    """The node that adds a linear's bias where that is apart from the product."""
    found = [
        reader
        for reader in graph.consumers(node.output[0])
        if node.op_type == "MatMul" and reader.op_type == "Add" and graph.module_of(reader) == layer
    ]
    return found[0] if found else None


def _make_room(graph: Graph, names: set[str]) -> None:
    """Rename the float initializers whose names the quantized layers take; the exporter lets layers share them."""
    for name in list(graph.initializers):
        if name.rpartition(".")[0] in names:
            tensor = graph.initializers.pop(name)
            tensor.name = f"float:{name}"
            graph.initializers[tensor.name] = tensor
            graph.replace_input(graph.consumers(name), name, tensor.name)


def _write_product(graph: Graph, layer: QuantizedLayer) -> None:
    """Give a layer's product its codes, its bias and its output quantizer."""
    node = graph.product_of(layer.name)
    weight = add_weight(graph, layer.name, layer.weight, transposed=node.op_type == "MatMul")
    bias = [] if layer.bias is None else [graph.constant(f"{layer.name}.bias", _numpy(layer.bias))]
    last = node
    if node.op_type == "Conv":
        node.input[:] = [node.input[0], weight, *bias]
    else:
        last = _separate_bias(graph, layer.name, node, weight, bias)
    if layer.output is not None:
        value, result = last.output[0], f"{layer.name}.result"
        readers = graph.consumers(value)
        last.output[0] = result
        quantized = add_quantizer(graph, f"{layer.name}.output", result, layer.output, channels=len(layer.weight.codes))
        graph.replace_input(readers, value, quantized)
        if value in graph.outputs:
            graph.add("Identity", [quantized], value)


def _separate_bias(graph: Graph, layer: str, node: Any, weight: str, bias: list[str]) -> Any:
    """Let a linear's product take a new weight, and its bias in an Add. Returns the last node of the layer."""
    addition = _addition(graph, layer, node)
    value = node.output[0]
    if addition is not None:
        value = addition.output[0]
        graph.nodes.remove(addition)
    node.input[:] = [node.input[0], weight]
    if not bias:
        node.output[0] = value
        return node
    node.output[0] = f"{layer}.product"
    graph.add("Add", [node.output[0], *bias], value)
    return graph.nodes[-1]


class _InputQuantizers:
    """Quantizers of layers' inputs, added once for each value and quantizer."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.known: list[tuple[str, InputQuantizer, str, str]] = []  # value, quantizer, quantized value, name

    def add(self, layer: QuantizedLayer) -> str:
        """Let a layer read its quantized input. Returns the name that the quantizer's initializers begin with."""
        if layer.input is None:
            return ""
        node = self.graph.product_of(layer.name)
        value = node.input[0]
        quantized, name = next(
            (
                (quantized, name)
                for known, quantizer, quantized, name in self.known
                if known == value and same_quantizer(quantizer, layer.input)
            ),
            ("", f"{layer.name}.input"),
        )
        if not quantized:
            channels = layer.weight.codes.shape[1] * int(attributes(node).get("group", 1))
            quantized = add_quantizer(self.graph, name, value, layer.input, channels)
            self.known.append((value, layer.input, quantized, name))
        node.input[0] = quantized
        return name


def _record(layer: QuantizedLayer, input_name: str) -> dict[str, Any]:
    """What `metadata_props` say of a layer: all that its initializers do not."""
    return {
        "name": layer.name,
        "bits": layer.weight.bits,
        "block": layer.weight.block,
        "bias": layer.bias is not None,
        "input": None if layer.input is None else _quantizer_record(layer.input, input_name),
        "output": None if layer.output is None else _quantizer_record(layer.output, f"{layer.name}.output"),
    }


def _quantizer_record(quantizer: InputQuantizer, name: str) -> dict[str, Any]:
    if isinstance(quantizer, Uniform):
        return {"kind": "uniform", "name": name, "bits": quantizer.bits, "signed": quantizer.signed}
    if isinstance(quantizer, Thresholds):
        return {"kind": "thresholds", "name": name, "bits": quantizer.bits}
    return {
        "kind": "block_float",
        "mantissa_bits": quantizer.mantissa_bits,
        "block": quantizer.block,
        "signed": quantizer.signed,
        "axis": quantizer.axis,
    }


def _numpy(tensor: Tensor) -> np.ndarray[Any, Any]:
    return tensor.detach().cpu().to(torch.float32).numpy()
