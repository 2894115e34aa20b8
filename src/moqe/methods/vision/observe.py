"""What calibration images put through a layer: the range of a tensor, and a random sample of its elements.

A sample of 2^17 elements stands for a tensor of any size: a clipped share of one in a thousand is still a hundred
elements, and a search over scales costs the same for every layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from moqe.errors import NumericalError
from moqe.methods.vision.layer import QuantizedLayer, Uniform, float32
from moqe.methods.vision.method import CalibrationImages
from moqe.methods.vision.network import quantize_network

SAMPLE = 1 << 17
BATCH = 64  # images per forward pass
CANDIDATES = 64  # scales tried
NARROWEST = 0.02  # of them, relative to the range; few bits gain from cutting off much


@dataclass(frozen=True)
class Observed:
    """lowest and highest element seen, and a random sample, float32 (n,)."""

    lowest: float
    highest: float
    sample: Tensor


def batches(images: CalibrationImages, size: int = BATCH) -> Iterator[Tensor]:
    """All images in order, float32 (b, 3, h, w)."""
    for start in range(0, len(images), size):
        yield images.batch(torch.arange(start, min(start + size, len(images))))


@torch.no_grad()
def observe(
    network: nn.Module, inputs: Sequence[str], outputs: Sequence[str], images: CalibrationImages, seed: int
) -> tuple[dict[str, Observed], dict[str, Observed]]:
    """What reached the layers called `inputs`, and what left those called `outputs`, by name, over all images.

    Raises NumericalError where something is not finite.
    """
    modules = dict(network.named_modules())
    share = -(-SAMPLE * BATCH // max(len(images), 1))  # elements to keep of every batch
    seen: tuple[dict[str, _Collector], dict[str, _Collector]] = (
        {name: _Collector(name, share, seed) for name in inputs},
        {name: _Collector(name, share, seed) for name in outputs},
    )
    handles = [modules[name].register_forward_pre_hook(_see_input(seen[0][name])) for name in inputs]
    handles += [modules[name].register_forward_hook(_see_output(seen[1][name])) for name in outputs]
    try:
        for batch in batches(images):
            network(batch)
    finally:
        for handle in handles:
            handle.remove()
    return (
        {name: collector.result() for name, collector in seen[0].items()},
        {name: collector.result() for name, collector in seen[1].items()},
    )


def uniform_for(observed: Observed, bits: int, percentile: float | None = None) -> Uniform:
    """Unsigned levels over what was seen: zero point 0 where nothing was negative.

    percentile: None searches the range with the least squared error on the sample; else the range is what is left
    when (100 - percentile) / 2 percent are cut at each end (all of it at the top where nothing was negative).
    """
    low, high = min(observed.lowest, 0.0), max(observed.highest, 0.0)
    if high == low:
        return Uniform(1.0, 0, bits)
    if percentile is not None:
        return _spanning(*_percentiles(observed.sample, percentile), bits)
    best, least = _spanning(low, high, bits), torch.inf
    for index in range(CANDIDATES):
        factor = NARROWEST ** (index / (CANDIDATES - 1)) if bits < 8 else 1.0 - 0.75 * index / CANDIDATES
        candidate = _spanning(factor * low, factor * high, bits)
        error = float((candidate(observed.sample) - observed.sample).square_().mean())
        if error < least:
            best, least = candidate, error
    return best


def with_outputs(
    network: nn.Module, layers: Sequence[QuantizedLayer], names: Iterable[str], images: CalibrationImages, seed: int
) -> tuple[QuantizedLayer, ...]:
    """The layers, those called `names` with 8-bit output quantizers fitted to what the quantized network puts out."""
    wanted = [layer.name for layer in layers if layer.name in set(names)]
    if not wanted:
        return tuple(layers)
    _, outputs = observe(quantize_network(network, layers), (), wanted, images, seed)
    return tuple(
        replace(layer, output=uniform_for(outputs[layer.name], 8)) if layer.name in outputs else layer
        for layer in layers
    )


class _Collector:
    """Grows an `Observed` batch by batch."""

    def __init__(self, name: str, share: int, seed: int) -> None:
        self.name, self.share = name, share
        self.generator = torch.Generator().manual_seed(seed)  # its own: a sample does not depend on other layers
        self.lowest, self.highest, self.parts = torch.inf, -torch.inf, list[Tensor]()

    def add(self, tensor: Tensor) -> None:
        flat = tensor.detach().reshape(-1).to(torch.float32)
        low, high = (float(bound) for bound in torch.aminmax(flat))
        if not (-torch.inf < low and high < torch.inf):  # false for nan too
            raise NumericalError(f"{self.name}: activations are not finite on the calibration images")
        self.lowest, self.highest = min(self.lowest, low), max(self.highest, high)
        if len(flat) > self.share:
            flat = flat[torch.randint(len(flat), (self.share,), generator=self.generator).to(flat.device)]
        self.parts.append(flat.clone())

    def result(self) -> Observed:
        if not self.parts:
            raise NumericalError(f"{self.name}: no calibration image reached it: calibration has no images")
        return Observed(self.lowest, self.highest, torch.cat(self.parts))


def _spanning(low: float, high: float, bits: int) -> Uniform:
    """Levels from low (at most 0) to high, with zero among them."""
    top = (1 << bits) - 1
    scale = float32(max((high - low) / top, torch.finfo(torch.float32).tiny))
    return Uniform(scale, round(-low / scale), bits)


def _percentiles(sample: Tensor, percentile: float) -> tuple[float, float]:
    ordered = sample.sort().values
    cut = (1.0 - percentile / 100.0) * (len(ordered) - 1)
    if float(ordered[0]) >= 0.0:
        return 0.0, float(ordered[round(len(ordered) - 1 - cut)])
    low, high = ordered[round(cut / 2)], ordered[round(len(ordered) - 1 - cut / 2)]
    return min(float(low), 0.0), max(float(high), 0.0)


def _see_input(collector: _Collector) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    return lambda module, arguments: collector.add(arguments[0])


def _see_output(collector: _Collector) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
    return lambda module, arguments, output: collector.add(output)
