"""Weights and quantizers as ONNX nodes: exactly the arithmetic of `methods/vision/layer.py`, in standard operators.

Spec: ONNX, opset 21 (QuantizeLinear, DequantizeLinear). What an initializer is called is part of the file format:

    <layer>.weight, .weight_scale            codes, INT8 or packed INT4, and their scales; .bias in float32
    <layer>.input_scale, .input_zero_point   the input's quantizer; .output_... likewise
    <layer>.input_fine_scale, .input_fine_zero_point, .input_thresholds    of learned thresholds

Codes of up to 4 bits lie packed in the file. Codes of fewer than 8 bits are spread over int8 once, when a session is
made, with scales that are so much smaller: no kernel of ONNX Runtime's CPU provider multiplies 4-bit integers, and it
rounds biases to multiples of input scale times weight scale, which would be coarse at 4 bits. Activations of fewer than
8 bits are cut by an integer Clip behind an 8-bit QuantizeLinear; a convolution before it still leaves integers.

Uniform     QuantizeLinear, Clip below 8 bits, DequantizeLinear: convolutions run in integers
Thresholds  QuantizeLinear to 16 bits, Gather from a table that is made of the thresholds when a session is made: levels
            are integers, but the product runs in float32
BlockFloat  Reshape to blocks, ReduceMax, the power of two below by three multiplications, Round, Clip: in float32
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from moqe.errors import NumericalError, UnsupportedLayer
from moqe.formats.onnx_graph import Graph, require_onnx
from moqe.methods.vision.layer import (
    FINE_LEVELS,
    SMALLEST_EXPONENT,
    BlockFloat,
    InputQuantizer,
    Thresholds,
    Uniform,
    WeightCodes,
)

PACKED_BITS = 4
# Rump, Ogita, Oishi, Accurate floating-point summation I (SIAM J. Sci. Comput. 31, 2008): the largest power of two
# that is not above |p| is |q - (1 - u) q| with q = (1 / 2u + 1) p, rounded to nearest; u = 2 ** -24 in float32.
_UFP_FACTOR, _UFP_SHRINK = np.float32(2**23 + 1), np.float32(1 - 2**-24)


def add_weight(graph: Graph, layer: str, weight: WeightCodes, transposed: bool) -> str:
    """Add a layer's codes and their dequantization. Returns the weight in float32, (in, out) if `transposed`."""
    name = f"{layer}.weight"
    codes = weight.codes.detach().cpu().numpy()
    if weight.bits <= PACKED_BITS:
        graph.initializers[name] = _packed(name, codes)
    else:
        graph.constant(name, codes)
    scale = graph.constant(f"{name}_scale", _float32(weight.scale))
    integers = name
    if weight.bits < 8:
        integers, scale = _widened(graph, name, widening(weight.bits))
    result = f"{name}_float"
    if weight.block:
        graph.add("DequantizeLinear", [integers, scale], result, axis=1, block_size=weight.block)
        return graph.add("Transpose", [result], f"{result}_transposed", perm=[1, 0]) if transposed else result
    # The zero points, all zero, are there for ONNX Runtime: it makes no integer product of a Gemm without them.
    zero = graph.constant(f"{name}_zero_point", np.zeros(len(codes), np.int8))
    if transposed:  # the codes rather than the floats: products of integers have no transposed weight
        integers = graph.add("Transpose", [integers], f"{name}_transposed", perm=[1, 0])
    return graph.add("DequantizeLinear", [integers, scale, zero], result, axis=1 if transposed else 0)


def widening(bits: int) -> int:
    """The power of two by which codes of so many bits are multiplied before they meet integer kernels."""
    return 1 << (8 - bits)


def _widened(graph: Graph, name: str, factor: int) -> tuple[str, str]:
    """Codes times a power of two and scales divided by it: the same weight, in codes that span int8."""
    types = require_onnx("ONNX").TensorProto
    wide = graph.add("Cast", [name], f"{name}_int32", to=types.INT32)
    factors = [graph.constant(f"moqe.factor_{factor}", np.int32(factor))]
    wide = graph.add("Mul", [wide, *factors], f"{name}_widened")
    shares = [graph.constant(f"moqe.share_{factor}", np.float32(1 / factor))]
    scale = graph.add("Mul", [f"{name}_scale", *shares], f"{name}_scale_widened")
    return graph.add("Cast", [wide], f"{name}_int8", to=types.INT8), scale


def add_quantizer(graph: Graph, name: str, value: str, quantizer: InputQuantizer, channels: int) -> str:
    """Add a quantizer, with initializers called `<name>_...`, that reads `value`. Returns the quantized value.

    channels: how many the value has, which block floating point needs.
    """
    if isinstance(quantizer, Uniform):
        return _uniform(graph, name, value, quantizer)
    if isinstance(quantizer, Thresholds):
        return _thresholds(graph, name, value, quantizer)
    return _block_float(graph, name, value, quantizer, channels)


def same_quantizer(first: InputQuantizer, second: InputQuantizer) -> bool:
    """Whether two quantizers compute the same, so that one set of nodes can serve both."""
    if isinstance(first, Thresholds) and isinstance(second, Thresholds):
        numbers = ("fine_scale", "fine_zero_point", "scale", "bits", "zero_point")
        return torch.equal(first.table, second.table) and all(
            getattr(first, key) == getattr(second, key) for key in numbers
        )
    return type(first) is type(second) and first == second


def thresholds_of(table: Tensor) -> np.ndarray[Any, Any]:
    """Where a table rises: int64, one fine code for each level above 0; 65536 for levels never reached."""
    levels = np.arange(1, int(table.max()) + 1)
    return np.searchsorted(table.cpu().numpy(), levels, side="left").astype(np.int64)


def table_of(thresholds: np.ndarray[Any, Any]) -> Tensor:
    """The table that rises by one at each threshold: uint8, (65536,)."""
    rises = np.bincount(thresholds, minlength=FINE_LEVELS + 1)[:FINE_LEVELS]
    return torch.from_numpy(np.cumsum(rises).astype(np.uint8))


def _uniform(graph: Graph, name: str, value: str, quantizer: Uniform) -> str:
    if quantizer.bits > 8:
        raise UnsupportedLayer(
            f"{name} is quantized to {quantizer.bits} bits and ONNX experts hold 8 at most: choose another scheme"
        )
    kind = np.int8 if quantizer.signed else np.uint8
    low, high = quantizer.levels
    value, bounds = _through_activation(graph, value, quantizer)
    low, high = max(low, bounds[0]), min(high, bounds[1])
    scale = graph.constant(f"{name}_scale", _scale(name, quantizer.scale))
    zero = graph.constant(f"{name}_zero_point", kind(quantizer.zero_point))
    codes = graph.add("QuantizeLinear", [value, scale, zero], f"{name}_codes")
    if (low, high) != (np.iinfo(kind).min, np.iinfo(kind).max):
        lowest, highest = graph.constant(f"{name}_lowest", kind(low)), graph.constant(f"{name}_highest", kind(high))
        codes = graph.add("Clip", [codes, lowest, highest], f"{name}_cut")
    return graph.add("DequantizeLinear", [codes, scale, zero], f"{name}_quantized")


def _through_activation(graph: Graph, value: str, quantizer: Uniform) -> tuple[str, tuple[int, int]]:
    """Move a quantizer before a Clip that feeds it, such as ReLU6: (what it reads then, bounds of its codes).

    Rounding never reverses an order, so cutting codes at the codes of the bounds is the same as cutting values at the
    bounds. ONNX Runtime joins a convolution with a QuantizeLinear only if nothing but a Relu lies between.
    """
    node = graph.producer(value)
    if node is None or node.op_type != "Clip" or len(node.input) != 3:
        return value, quantizer.levels
    bounds = [graph.array(name) for name in node.input[1:]]
    if any(bound is None for bound in bounds):
        return value, quantizer.levels
    scale = np.float32(quantizer.scale)
    codes = [int(np.rint(np.float32(bound) / scale)) + quantizer.zero_point for bound in bounds]
    low, high = quantizer.levels
    return node.input[0], (min(max(codes[0], low), high), min(max(codes[1], low), high))


def _thresholds(graph: Graph, name: str, value: str, quantizer: Thresholds) -> str:
    types = require_onnx("ONNX").TensorProto
    scale = graph.constant(f"{name}_fine_scale", _scale(name, quantizer.fine_scale))
    zero = graph.constant(f"{name}_fine_zero_point", np.uint16(quantizer.fine_zero_point))
    fine = graph.add("QuantizeLinear", [value, scale, zero], f"{name}_fine")
    index = graph.add("Cast", [fine], f"{name}_fine_index", to=types.INT32)
    levels = graph.add("Gather", [_table(graph, name, quantizer), index], f"{name}_codes")
    scale = graph.constant(f"{name}_scale", _scale(name, quantizer.scale))
    zero = graph.constant(f"{name}_zero_point", np.uint8(quantizer.zero_point))
    return graph.add("DequantizeLinear", [levels, scale, zero], f"{name}_quantized")


def _table(graph: Graph, name: str, quantizer: Thresholds) -> str:
    """The table from its few thresholds: 2 KiB in the file instead of 64; a session computes it once, when made."""
    onnx = require_onnx("ONNX")
    rises = thresholds_of(quantizer.table)
    thresholds = graph.constant(f"{name}_thresholds", rises)
    length = graph.constant("moqe.fine_length", np.array([FINE_LEVELS + 1]))
    zeros = graph.add(
        "ConstantOfShape",
        [length],
        f"{name}_no_rise",
        value=onnx.numpy_helper.from_array(np.zeros(1, np.int32), "zero"),
    )
    ones = graph.constant(f"{name}_rise", np.ones(len(rises), np.int32))
    counts = graph.add("ScatterElements", [zeros, thresholds, ones], f"{name}_rises", axis=0, reduction="add")
    sums = graph.add("CumSum", [counts, graph.constant("moqe.axis_0", np.int64(0))], f"{name}_sums")
    first = graph.constant("moqe.fine_first", np.array([0]))
    last = graph.constant("moqe.fine_last", np.array([FINE_LEVELS]))
    cut = graph.add("Slice", [sums, first, last], f"{name}_levels")
    return graph.add("Cast", [cut], f"{name}_table", to=onnx.TensorProto.UINT8)


def _block_float(graph: Graph, name: str, value: str, quantizer: BlockFloat, channels: int) -> str:
    bits = quantizer.mantissa_bits - 1 if quantizer.signed else quantizer.mantissa_bits
    low, high = (-(1 << bits) if quantizer.signed else 0), (1 << bits) - 1
    block = min(quantizer.block, channels)
    count = -(-channels // block)
    missing = count * block - channels
    axis = graph.constant(f"{name}_axis", np.array([quantizer.axis]))
    whole = value
    if missing:  # zeros change no block's largest magnitude
        pads = graph.constant(f"{name}_pads", np.array([0, missing]))
        whole = graph.add("Pad", [value, pads, "", axis], f"{name}_padded")
    shape = graph.add("Shape", [whole], f"{name}_shape")
    split = [0, count, block, -1] if quantizer.axis == 1 else [-1, count, block]
    parts = graph.add("Reshape", [whole, graph.constant(f"{name}_split", np.array(split))], f"{name}_blocks")
    largest = graph.add("Abs", [parts], f"{name}_magnitude")
    largest = graph.add("ReduceMax", [largest, graph.constant("moqe.axis_2", np.array([2]))], f"{name}_largest")
    least = graph.constant("moqe.least_power", np.float32(2.0**SMALLEST_EXPONENT))
    largest = graph.add("Max", [largest, least], f"{name}_bounded")
    grown = graph.add("Mul", [largest, graph.constant("moqe.ufp_factor", _UFP_FACTOR)], f"{name}_grown")
    shrunk = graph.add("Mul", [grown, graph.constant("moqe.ufp_shrink", _UFP_SHRINK)], f"{name}_shrunk")
    power = graph.add("Sub", [grown, shrunk], f"{name}_power")
    ratio = graph.constant(f"{name}_step_ratio", np.float32(2.0 ** (1 - bits)))
    step = graph.add("Mul", [power, ratio], f"{name}_step")
    scaled = graph.add("Div", [parts, step], f"{name}_scaled")
    rounded = graph.add("Round", [scaled], f"{name}_rounded")
    bounds = [graph.constant(f"{name}_{key}", np.float32(bound)) for key, bound in (("lowest", low), ("highest", high))]
    mantissas = graph.add("Clip", [rounded, *bounds], f"{name}_mantissas")
    result = graph.add("Mul", [mantissas, step], f"{name}_joined")
    result = graph.add("Reshape", [result, shape], f"{name}_padded_quantized" if missing else f"{name}_quantized")
    if missing:
        ends = [graph.constant(f"{name}_first", np.array([0])), graph.constant(f"{name}_last", np.array([channels]))]
        result = graph.add("Slice", [result, *ends, axis], f"{name}_quantized")
    return result


def _packed(name: str, codes: np.ndarray[Any, Any]) -> Any:
    """INT4, two codes a byte, the first in the low half; an odd end is filled with zero."""
    onnx = require_onnx("ONNX")
    nibbles = codes.reshape(-1).view(np.uint8) & 0xF
    nibbles = np.append(nibbles, np.zeros(len(nibbles) % 2, np.uint8))
    data = (nibbles[0::2] | nibbles[1::2] << 4).tobytes()
    return onnx.helper.make_tensor(name, onnx.TensorProto.INT4, codes.shape, data, raw=True)


def _scale(name: str, value: float) -> np.float32:
    if not (0 < value < float("inf") and float(np.float32(value)) == value):
        raise NumericalError(f"{name}: the scale {value} is no positive float32 number, which is all a file can hold")
    return np.float32(value)


def _float32(tensor: Tensor) -> np.ndarray[Any, Any]:
    return tensor.detach().cpu().to(torch.float32).numpy()
