"""Read the quantized layers of an ONNX expert back, exactly as they were written.

Only initializers and `metadata_props` are looked at, never the graph: what a layer is called and which of its
initializers mean what is stated by `onnx_nodes.py`. Files that others have made hold no such statement and are refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moqe.errors import CheckpointError
from moqe.formats.onnx_graph import require_onnx
from moqe.formats.onnx_nodes import table_of
from moqe.formats.onnx_writer import LAYERS_KEY
from moqe.methods.vision.layer import (
    FINE_LEVELS,
    BlockFloat,
    InputQuantizer,
    QuantizedLayer,
    Thresholds,
    Uniform,
    WeightCodes,
    signed_range,
)


def read_onnx_layers(path: Path) -> tuple[QuantizedLayer, ...]:
    """The quantized layers of an expert, in the order in which they were written.

    Raises CheckpointError when the file is missing, truncated, damaged or not one of MoQE's; MissingExtra without onnx.
    """
    model = _load(path)
    properties = _properties(model)
    if LAYERS_KEY not in properties:
        raise CheckpointError(
            f"{path} does not say how its layers are quantized ({LAYERS_KEY} is not in its metadata): it is truncated, "
            "or MoQE has not written it"
        )
    numbers = _Initializers(model)
    try:
        return tuple(_layer(record, numbers) for record in json.loads(properties[LAYERS_KEY]))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        reason = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(f"{path} is damaged: {reason}; delete it and build again") from error


def read_onnx_metadata(path: Path) -> dict[str, str]:
    """The texts that were written into an ONNX file, without the description of its layers.

    Raises CheckpointError when the file is missing or damaged; MissingExtra without onnx.
    """
    return {key: value for key, value in _properties(_load(path)).items() if key != LAYERS_KEY}


def _load(path: Path) -> Any:
    onnx = require_onnx("reading an ONNX file")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    try:
        model = onnx.load_model_from_string(content)
    except Exception as error:  # protobuf's DecodeError lives in a package that is not ours to depend on
        raise CheckpointError(
            f"{path} is no ONNX file, or a damaged one: {error}; delete it and build again"
        ) from error
    if not model.graph.node:
        raise CheckpointError(f"{path} holds no ONNX graph: delete it and build again")
    return model


def _properties(model: Any) -> dict[str, str]:
    return {entry.key: entry.value for entry in model.metadata_props}


class _Initializers:
    """A file's initializers as tensors and numbers, checked against what is expected of them."""

    def __init__(self, model: Any) -> None:
        self._by_name = {tensor.name: tensor for tensor in model.graph.initializer}

    def tensor(self, name: str, kinds: tuple[type[np.generic], ...], size: int | None = None) -> Tensor:
        """An initializer as a tensor, 4-bit integers as int8. Raises ValueError on another type or size."""
        array = require_onnx("reading an ONNX file").numpy_helper.to_array(self._by_name[name])
        if array.dtype.name == "int4":
            array = array.astype(np.int8)
        if array.dtype not in [np.dtype(kind) for kind in kinds]:
            raise ValueError(f"{name} holds {array.dtype}")
        if size is not None and array.size != size:
            raise ValueError(f"{name} holds {array.size} numbers and not {size}")
        return torch.from_numpy(array.copy())

    def scale(self, name: str) -> float:
        """One positive float32 number."""
        value = float(self.tensor(name, (np.float32,), 1))
        if not 0 < value < float("inf"):
            raise ValueError(f"{name} is {value}")
        return value

    def integer(self, name: str, *kinds: type[np.generic]) -> int:
        """One integer of one of these types."""
        return int(self.tensor(name, kinds, 1))


def _layer(record: Mapping[str, Any], numbers: _Initializers) -> QuantizedLayer:
    name = record["name"]
    output = _quantizer(record["output"], numbers)
    if not isinstance(output, Uniform | None):
        raise ValueError(f"the output of {name} is quantized by {type(output).__name__}")
    weight = _weight(name, record["bits"], record["block"], numbers)
    bias = numbers.tensor(f"{name}.bias", (np.float32,), len(weight.codes)) if record["bias"] else None
    return QuantizedLayer(name, weight, bias, _quantizer(record["input"], numbers), output)


def _weight(layer: str, bits: int, block: int, numbers: _Initializers) -> WeightCodes:
    name = f"{layer}.weight"
    codes = numbers.tensor(name, (np.int8,))
    if bits not in range(1, 9):
        raise ValueError(f"{name} is said to have {bits} bits")
    low, high = signed_range(bits)
    if int(codes.min()) < low or int(codes.max()) > high:
        raise ValueError(f"{name} holds codes of more than {bits} bits")
    scale = numbers.tensor(f"{name}_scale", (np.float32,))
    shape = codes.shape[:1] if not block else (len(codes), -(-codes.shape[1] // block), *codes.shape[2:])
    if scale.shape != shape or not torch.isfinite(scale).all():
        raise ValueError(f"{name}_scale has shape {tuple(scale.shape)} and not {tuple(shape)}, or is not finite")
    return WeightCodes(codes, scale, block, bits)


def _quantizer(record: Mapping[str, Any] | None, numbers: _Initializers) -> InputQuantizer | None:
    if record is None:
        return None
    if record["kind"] == "block_float":
        return BlockFloat(record["mantissa_bits"], record["block"], record["signed"], record["axis"])
    name = record["name"]
    scale = numbers.scale(f"{name}_scale")
    if record["kind"] == "uniform":
        zero = numbers.integer(f"{name}_zero_point", np.int8 if record["signed"] else np.uint8)
        return Uniform(scale, zero, record["bits"], record["signed"])
    if record["kind"] == "thresholds":
        rises = numbers.tensor(f"{name}_thresholds", (np.int64,)).numpy()
        if rises.size >= 1 << record["bits"] or rises.min(initial=0) < 0 or rises.max(initial=0) > FINE_LEVELS:
            raise ValueError(f"{name}_thresholds do not fit {record['bits']} bits")
        return Thresholds(
            table_of(rises),
            numbers.scale(f"{name}_fine_scale"),
            numbers.integer(f"{name}_fine_zero_point", np.uint16),
            scale,
            record["bits"],
            numbers.integer(f"{name}_zero_point", np.uint8),
        )
    raise ValueError(f"{record['kind']!r} is an unknown kind of quantizer")
