"""A float network as an ONNX graph, and the few edits that quantization makes to such a graph.

Spec: ONNX, opset 21, the first with 4-bit and blocked quantization. The graph comes from `torch.onnx.export`. A layer's
multiplication is found by the module path that the exporter notes on each node, and checked by its values, because the
exporter's optimizer merges equal weights, drops zero biases and folds transposes.

Cost: seconds per export, most of it torch's and independent of the weights.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from moqe.errors import MissingExtra, ModelError, UnsupportedLayer

OPSET = 21
IR_VERSION = 10  # of the files: what opset 21 came with
INPUT, OUTPUT, BATCH = "pixels", "logits", "batch"
_PRODUCTS = ("Conv", "Gemm", "MatMul")
_SCOPES = "pkg.torch.onnx.name_scopes"


def require_onnx(purpose: str) -> Any:
    """The package onnx. Raises MissingExtra when it is not installed."""
    try:
        return importlib.import_module("onnx")
    except ModuleNotFoundError:
        raise MissingExtra("onnx", "vision", purpose) from None


def export_float_graph(network: nn.Module, image_shape: Sequence[int]) -> Any:
    """A classifier as an ONNX model in float32 with a free batch size: `pixels`, (batch, 3, h, w), to `logits`.

    network: float32, in eval mode, convolution and batch norm folded; it is not changed. image_shape: of one input,
    (3, h, w), or (features,) for a network that takes vectors, such as a router.
    Raises ModelError when torch cannot export it, MissingExtra without the packages onnx and onnxscript.
    """
    require_onnx("writing an ONNX file")
    try:
        importlib.import_module("onnxscript")
    except ModuleNotFoundError:
        raise MissingExtra("onnxscript", "vision", "writing an ONNX file") from None
    example = torch.zeros(2, *image_shape)  # two images: torch would take a batch of one for a constant
    try:
        with _quiet(), torch.no_grad():
            # Captured here: left alone, torch.onnx.export falls back to captures that fix the batch size.
            sizes = ({0: torch.export.Dim(BATCH)},)
            program = torch.export.export(deepcopy(network).cpu().eval(), (example,), dynamic_shapes=sizes)
            onnx_program = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=OPSET,
                input_names=[INPUT],
                output_names=[OUTPUT],
                verbose=False,
            )
    except Exception as error:  # the exporter lets through whatever the network and torch.compile raise
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        raise ModelError(
            f"{type(network).__name__} cannot be exported to ONNX for images of shape {tuple(image_shape)}: {reason}"
        ) from error
    assert onnx_program is not None
    return onnx_program.model_proto


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's warnings and log lines, which are about its own insides, from the user."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)


@dataclass
class Graph:
    """A model's nodes and initializers while they are edited; `finish` makes a model of them again.

    Names of values are unique. `add` appends nodes in any order: `finish` sorts them.
    """

    model: Any
    nodes: list[Any] = field(default_factory=list)
    initializers: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, model: Any) -> Graph:
        """The graph of a model that has no functions and no subgraphs of interest."""
        return cls(model, list(model.graph.node), {tensor.name: tensor for tensor in model.graph.initializer})

    def array(self, name: str) -> np.ndarray[Any, Any] | None:
        """The values of an initializer, or None where `name` is something else."""
        tensor = self.initializers.get(name)
        return None if tensor is None else require_onnx("ONNX").numpy_helper.to_array(tensor)

    def constant(self, name: str, values: np.ndarray[Any, Any] | np.generic) -> str:
        """Add an initializer; the same name may be given again with the same values. Returns the name."""
        onnx = require_onnx("ONNX")
        self.initializers[name] = onnx.numpy_helper.from_array(np.asarray(values), name)
        return name

    def add(self, operator: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        """Add a node, named after its one output. Returns the output."""
        self.nodes.append(
            require_onnx("ONNX").helper.make_node(operator, inputs, [output], name=f"{operator}:{output}", **attributes)
        )
        return output

    def producer(self, value: str) -> Any | None:
        """The node that makes a value, None for inputs and initializers."""
        return next((node for node in self.nodes if value in node.output), None)

    def consumers(self, value: str) -> list[Any]:
        """The nodes that read a value."""
        return [node for node in self.nodes if value in node.input]

    def replace_input(self, nodes: Sequence[Any], old: str, new: str) -> None:
        """Let nodes read `new` where they read `old`."""
        for node in nodes:
            node.input[:] = [new if name == old else name for name in node.input]

    def product_of(self, layer: str) -> Any:
        """The node that multiplies by a layer's weight. Raises UnsupportedLayer unless there is exactly one."""
        found = [node for node in self.nodes if node.op_type in _PRODUCTS and self.module_of(node) == layer]
        if len(found) != 1:
            times = "never" if not found else f"{len(found)} times"
            raise UnsupportedLayer(
                f"{layer} multiplies {times} in the exported graph: an ONNX expert needs layers that run once, so keep "
                "this one in full precision"
            )
        return found[0]

    @property
    def outputs(self) -> set[str]:
        """Names of the graph's own outputs."""
        return {value.name for value in self.model.graph.output}

    def module_of(self, node: Any) -> str:
        """Path of the module in whose forward a node was made; empty where the exporter does not say."""
        for entry in node.metadata_props:
            if entry.key == _SCOPES:
                scopes = ast.literal_eval(entry.value)  # from the network itself down to the operation
                return str(scopes[-2]) if len(scopes) > 1 else ""
        return ""

    def finish(self) -> Any:
        """The edited model: nodes in the order they run, nothing unused, nothing that tells where it was made."""
        onnx = require_onnx("ONNX")
        graph = self.model.graph
        nodes = self._sorted(self._alive())
        used = {name for node in nodes for name in node.input}
        graph_ = onnx.helper.make_graph(
            [_bare(node) for node in nodes],
            "classifier",
            [_bare(value) for value in graph.input],
            [_bare(value) for value in graph.output],
            [self.initializers[name] for name in sorted(used & set(self.initializers))],
        )
        return onnx.helper.make_model(
            graph_, opset_imports=[onnx.helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="moqe"
        )

    def _alive(self) -> list[Any]:
        """Nodes on which the output depends."""
        producers = {name: node for node in self.nodes for name in node.output}
        wanted = [value.name for value in self.model.graph.output]
        alive: set[str] = set()
        while wanted:
            node = producers.get(wanted.pop())
            if node is not None and node.output[0] not in alive:
                alive.add(node.output[0])
                wanted += node.input
        return [node for node in self.nodes if node.output[0] in alive]

    def _sorted(self, nodes: list[Any]) -> list[Any]:
        """The nodes in an order in which they can run, stable."""
        waiting = {name for node in nodes for name in node.output}
        ordered: list[Any] = []
        while nodes:
            ready = [node for node in nodes if not waiting.intersection(node.input)]
            assert ready, "the graph has a cycle"
            ordered += ready
            waiting.difference_update(name for node in ready for name in node.output)
            chosen = {id(node) for node in ready}
            nodes = [node for node in nodes if id(node) not in chosen]
        return ordered


def attributes(node: Any) -> dict[str, Any]:
    """A node's attributes by name."""
    helper = require_onnx("ONNX").helper
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def _bare(item: Any) -> Any:
    """A node or value without the exporter's notes, which hold paths and stack traces."""
    del item.metadata_props[:]
    item.doc_string = ""
    return item
