"""The reference network: a copy of the folded network that computes what the quantized layers say, in float32."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import deepcopy
from typing import Any

from torch import Tensor, nn

from moqe.errors import ModelError
from moqe.methods.vision.layer import QuantizedLayer

Quantizer = Callable[[Tensor], Tensor]


def quantize_network(network: nn.Module, layers: Iterable[QuantizedLayer]) -> nn.Module:
    """A copy of a folded network, float32, whose listed layers hold dequantized weights and quantize their inputs.

    Products and sums are float32's, so results differ from integer execution by float32 rounding at most, which can
    move an activation that lies between two codes by one of them.
    Raises ModelError when a layer's name or shape does not belong to the network.
    """
    copy = deepcopy(network).eval().requires_grad_(False)
    modules = dict(copy.named_modules())
    for layer in layers:
        module = modules.get(layer.name)
        if not isinstance(module, nn.Conv2d | nn.Linear):
            raise ModelError(f"the network has no convolution or linear named {layer.name!r}: open its own base model")
        if module.weight.shape != layer.weight.codes.shape:
            raise ModelError(
                f"{layer.name}: the weight has shape {tuple(module.weight.shape)} and its codes "
                f"{tuple(layer.weight.codes.shape)}: open the base model they were made from"
            )
        device = module.weight.device
        module.weight = nn.Parameter(layer.weight.dequantize().to(device), requires_grad=False)
        bias = None if layer.bias is None else layer.bias.detach().clone().to(device)
        module.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        if layer.input is not None:
            module.register_forward_pre_hook(on_input(layer.input))
        if layer.output is not None:
            module.register_forward_hook(on_output(layer.output))
    return copy


def on_input(quantizer: Quantizer) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    """A forward pre-hook that passes a module's first argument through `quantizer`."""

    def hook(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return (quantizer(arguments[0]), *arguments[1:])

    return hook


def on_output(quantizer: Quantizer) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
    """A forward hook that passes a module's output through `quantizer`."""

    def hook(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
        return quantizer(output)

    return hook
