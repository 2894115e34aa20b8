"""Biases that integer kernels add exactly, so that ONNX Runtime and the reference network compute the same.

An integer convolution adds its bias to the int32 sum of products, so ONNX Runtime rounds it to a multiple of input
scale times weight scale. The error is far below one code of the output and still moves about one activation in a
thousand to a neighbouring code: on a CIFAR-10 ResNet-20 no image in a thousand kept its logits. With biases that are
multiples already, three of four images do.

A channel whose weights are next to nothing has so small a scale that its bias does not fit into int32; it would be cut.
Such a scale is raised until the bias fits, which changes what one step of an input contributes by less than 2 ** -23 of
the bias.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from moqe.formats.onnx_nodes import widening
from moqe.methods.vision.layer import QuantizedLayer, Uniform, WeightCodes

_LARGEST = float(1 << 29)  # of a bias in steps; the sum of products needs room too


def integer_biases(layers: Iterable[QuantizedLayer]) -> tuple[QuantizedLayer, ...]:
    """The layers with biases as integer kernels hold them; those that run in float stay as they are."""
    return tuple(_rounded(layer) for layer in layers)


def bias_steps(layer: QuantizedLayer) -> Tensor | None:
    """What an integer kernel counts a bias in: input scale times weight scale, float32, (out,); None in float."""
    if not isinstance(layer.input, Uniform) or layer.weight.block:
        return None
    return layer.weight.scale.new_tensor(layer.input.scale) * (layer.weight.scale / widening(layer.weight.bits))


def _rounded(layer: QuantizedLayer) -> QuantizedLayer:
    bias, step = layer.bias, bias_steps(layer)
    if bias is None or step is None:
        return layer
    small = bias.abs() > _LARGEST * step
    if bool(small.any()):
        factor = torch.where(small, (bias.abs() / (_LARGEST * step)).clamp(min=1.0), 1.0)
        layer = replace(layer, weight=_rescaled(layer.weight, factor))
        step = bias_steps(layer)
        assert step is not None
    return replace(layer, bias=(bias / step).round() * step)


def _rescaled(weight: WeightCodes, factor: Tensor) -> WeightCodes:
    """The weight in codes of scales that are `factor`, (out,), at least 1, times as large."""
    shape = (-1, *[1] * (weight.codes.ndim - 1))
    return replace(
        weight, codes=(weight.codes / factor.view(shape)).round().to(torch.int8), scale=weight.scale * factor
    )
