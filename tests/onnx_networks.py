"""A small classifier with everything that ONNX experts must cope with, and random quantized layers for it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from moqe.formats.onnx_graph import export_float_graph
from moqe.formats.onnx_writer import build_onnx_model
from moqe.methods.vision.layer import (
    BlockFloat,
    InputQuantizer,
    QuantizedLayer,
    Thresholds,
    Uniform,
    WeightCodes,
    float32,
)

IMAGE_SHAPE = (3, 12, 12)


class SmallNet(nn.Module):
    """Residual additions, a depthwise convolution, ReLU6, a bias of zero, two equal weights, linears on channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 10, 3, padding=1)
        self.depthwise = nn.Conv2d(10, 10, 3, padding=1, groups=10, bias=False)
        self.project = nn.Conv2d(10, 10, 1)
        self.left, self.right = nn.Conv2d(10, 6, 3, stride=2, padding=1), nn.Conv2d(10, 6, 3, stride=2, padding=1)
        self.widen, self.narrow = nn.Linear(6, 9), nn.Linear(9, 6, bias=False)
        self.head = nn.Linear(6, 5)
        with torch.no_grad():
            self.project.bias.zero_()
            self.right.weight.copy_(self.left.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu6(self.stem(x) * 1.0)
        x = functional.relu(x + self.project(functional.relu6(self.depthwise(x))))
        x = functional.relu(self.left(x) + self.right(x))
        x = x + self.narrow(functional.gelu(self.widen(x.permute(0, 2, 3, 1)))).permute(0, 3, 1, 2)
        return self.head(x.mean((2, 3)))


@cache
def small_net() -> nn.Module:
    """The network, with weights that spread its logits."""
    torch.manual_seed(3)
    network = SmallNet().eval().requires_grad_(False)
    network.head.weight.mul_(8)
    network.stem.weight.mul_(6)
    return network


@cache
def small_graph() -> Any:
    """The network's float graph: exporting takes seconds."""
    return export_float_graph(small_net(), IMAGE_SHAPE)


def images(count: int, seed: int = 0) -> Tensor:
    """Random images."""
    return torch.randn(count, *IMAGE_SHAPE, generator=torch.Generator().manual_seed(seed))


def write(path: Path, layers: tuple[QuantizedLayer, ...], metadata: Mapping[str, str] | None = None) -> Path:
    """An expert of the small network on disk, without exporting it again."""
    model = build_onnx_model(small_graph(), small_net(), layers, metadata or {})
    path.write_bytes(model.SerializeToString(deterministic=True))
    return path


def ranges(network: nn.Module, x: Tensor) -> dict[str, tuple[float, float, float, float]]:
    """Extremes of the input and of the output of each layer, in the order in which they run."""
    found: dict[str, tuple[float, float, float, float]] = {}

    def note(name: str) -> Any:
        def hook(module: nn.Module, arguments: tuple[Tensor], output: Tensor) -> None:
            (given,) = arguments
            found[name] = (float(given.min()), float(given.max()), float(output.min()), float(output.max()))

        return hook

    modules = [(name, module) for name, module in network.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    handles = [module.register_forward_hook(note(name)) for name, module in modules]
    with torch.no_grad():
        network(x)
    for handle in handles:
        handle.remove()
    return found


def codes(weight: Tensor, bits: int, block: int = 0) -> WeightCodes:
    """A weight rounded to the nearest codes, one scale per output channel or per block of input channels."""
    highest = (1 << (bits - 1)) - 1
    if not block:
        scale = weight.flatten(1).abs().amax(1) / highest
        whole = scale.view(-1, *[1] * (weight.ndim - 1))
    else:
        scale = torch.stack([part.abs().amax(1) for part in weight.split(block, 1)], 1) / highest
        whole = scale.repeat_interleave(block, 1)[:, : weight.shape[1]]
    return WeightCodes((weight / whole).round().to(torch.int8), scale, block, bits)


def uniform(low: float, high: float, bits: int, signed: bool = False) -> Uniform:
    """The quantizer whose codes span a range and zero."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = float32((high - low) / ((1 << bits) - 1))
    offset = 1 << (bits - 1) if signed else 0
    return Uniform(scale, round(-low / scale) - offset, bits, signed)


def thresholds(low: float, high: float, bits: int) -> Thresholds:
    """Uneven thresholds over a range."""
    low = min(low, 0.0)
    fine_scale, scale = float32((high - low) / 65535), float32((high - low) / ((1 << bits) - 1))
    steps = (torch.arange(1, 1 << bits) - 0.5) / ((1 << bits) - 1)
    rises = ((0.8 * steps + 0.2 * steps**2) * 65535).long()
    table = torch.searchsorted(rises, torch.arange(65536), right=True).to(torch.uint8)
    return Thresholds(table, fine_scale, round(-low / fine_scale), scale, bits, round(-low / scale))


def quantized_layers(kind: str, scheme_bits: int) -> tuple[QuantizedLayer, ...]:
    """All layers of the small network, their inputs quantized in one of the three ways; the ends in 8 bits always.

    Uniform layers that feed an addition or a mean quantize their outputs to 8 bits, as 8-bit methods do.
    """
    network, layers = small_net(), []
    for name, (low, high, out_low, out_high) in ranges(network, images(64)).items():
        module = network.get_submodule(name)
        bits = 8 if name in ("stem", "head") else scheme_bits
        quantizer: InputQuantizer = uniform(low, high, bits)
        if kind == "thresholds":
            quantizer = thresholds(low, high, bits)
        if kind == "block_float":
            quantizer = BlockFloat(bits, 4, low < 0, 1 if isinstance(module, nn.Conv2d) else -1)
        weight = codes(module.weight, bits, 4 if kind == "block_float" else 0)
        feeds_addition = name in ("stem", "project", "left", "right")
        output = uniform(out_low, out_high, 8) if kind == "uniform" and feeds_addition else None
        layers.append(QuantizedLayer(name, weight, module.bias, quantizer, output))
    return tuple(layers)
