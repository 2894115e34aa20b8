"""ptq: round the weights, calibrate the activations, train nothing. The baseline of every vision certificate.

Source: common practice, as described by Nagel et al., "A White Paper on Neural Network Quantization", 2021 (arXiv
2106.08295), section 3.

Weights have one symmetric scale per output channel, the one with the least squared rounding error (`grids.py`).
Activations have one scale per tensor, unsigned, with zero point 0 after a ReLU; the range is the one with the least
squared error on calibration activations, or a percentile (`ptq: {percentile: 99.99}`). First and last layer have 8
bits in every scheme, which is what the papers of qat and brecq do, so the comparison is fair. At 8 bits, layers whose
output goes to an addition get an 8-bit output quantizer, because real int8 execution needs one there.

Cost: one forward pass over the calibration images, one more for outputs, and 40 roundings of the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from moqe.errors import UnsupportedLayer
from moqe.methods.grids import round_to_grid, searched_grid
from moqe.methods.vision.layer import QuantizedLayer, WeightCodes
from moqe.methods.vision.method import PASSES, Job, VisionResult
from moqe.methods.vision.observe import observe, uniform_for, with_outputs
from moqe.methods.vision.output_error import error_notes
from moqe.models.convolutions import LayerSite
from moqe.recipe import Expert
from moqe.schemes import Scheme


class Ptq:
    """Plain post-training quantization."""

    def forward_passes(self, expert: Expert, images: int) -> float:
        """See `VisionMethod`."""
        return PASSES * images

    def fit(self, job: Job) -> VisionResult:
        """See `VisionMethod.fit`."""
        with job.progress.track(f"{job.expert.name}: calibrating", 3) as advance:
            layers = ptq_layers(job, job.expert.ptq.percentile)
            advance(1)
            layers = with_int8_outputs(job, layers)
            advance(1)
            notes = error_notes(job, layers, layers)
            advance(1)
        return VisionResult(layers, notes)


def ptq_layers(job: Job, percentile: float | None = None) -> tuple[QuantizedLayer, ...]:
    """Every site quantized plainly, without output quantizers: where all trained methods start.

    Raises UnsupportedLayer when the network has no site, NumericalError where numbers are not finite.
    """
    if not job.sites:
        raise UnsupportedLayer("the network has no convolution or linear to quantize")
    modules = dict(job.network.named_modules())
    inputs, _ = observe(job.network, [site.name for site in job.sites], (), job.images, job.seed)
    layers = []
    for site in job.sites:
        own = layer_scheme(site, job.sites, job.scheme)
        module = modules[site.name]
        assert isinstance(module, nn.Conv2d | nn.Linear)
        bias = None if module.bias is None else module.bias.detach().cpu().clone()
        activation = uniform_for(inputs[site.name], own.activation_bits, percentile)
        layers.append(QuantizedLayer(site.name, round_weight(module.weight.detach().cpu(), own), bias, activation))
    return tuple(layers)


def layer_scheme(site: LayerSite, sites: Sequence[LayerSite], scheme: Scheme) -> Scheme:
    """The scheme of one layer: 8 bits for the first and the last that run, one scale per output channel."""
    if site.name in (sites[0].name, sites[-1].name):
        return replace(scheme, weight_bits=8, activation_bits=8, group_size=0)
    return replace(scheme, group_size=0)


def round_weight(weight: Tensor, scheme: Scheme) -> WeightCodes:
    """A weight, float32, rounded with the error-minimising symmetric scale per output channel."""
    rows = weight.flatten(1)  # (out, in * kh * kw)
    scale, zero = searched_grid(rows, scheme, torch.float32)
    codes = round_to_grid(rows, scale, zero, scheme).codes
    return WeightCodes(codes.view(weight.shape), scale[:, 0].contiguous(), 0, scheme.weight_bits)


def with_int8_outputs(job: Job, layers: Sequence[QuantizedLayer]) -> tuple[QuantizedLayer, ...]:
    """The layers with output quantizers where int8 execution needs them; as they are where not all is int8."""
    if (job.scheme.weight_bits, job.scheme.activation_bits) != (8, 8):
        return tuple(layers)
    names = [site.name for site in job.sites if site.needs_output]
    return with_outputs(job.network, layers, names, job.images, job.seed)
