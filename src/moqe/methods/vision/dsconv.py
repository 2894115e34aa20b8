"""dsconv: integer kernels with a float shift per block of channels, activations in block floating point.

Paper: do Nascimento, Fawcett, Prisacariu, "DSConv: Efficient Convolution Operator", ICCV 2019 (arXiv 1901.01928).

A kernel is cut into blocks of `block` input channels at each output channel and kernel position. A block is a vector of
integers q times one float, the kernel distribution shift; given q, the shift with the least squared error is

    shift = sum(w q) / sum(q q)

Activations are cut into blocks of channels likewise: a block shares the exponent of its largest magnitude.

Faithful: the blocks and shifts, the closed form, block floating point with two's complement mantissas of the scheme's
activation bits; all convolutions are quantized at the scheme's bits, the
first one too, and linears are left in full precision, as in the authors' networks.
Different:
- Codes are searched together with the shift (`grids.py`) rather than scaled once by the largest weight.
- Mantissas are unsigned where inputs cannot be negative: after a ReLU the sign would say nothing.
- A depthwise convolution has a depth of one, where a shift per weight would be the weight itself: its shifts are per
  output channel.
- The adaptation, distillation from the full-precision network on unlabelled images with straight-through gradients, is
  the paper's option and here the default (`steps: 0` is the plain conversion). Shifts are trained as steps are in
  `lsq.py`, where the paper fits them anew.

Cost: a search over the weights; with adaptation, a forward and a backward pass per step and image.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from moqe.errors import UnsupportedLayer
from moqe.methods.grids import round_to_grid, searched_grid
from moqe.methods.vision.layer import BlockFloat, QuantizedLayer, WeightCodes
from moqe.methods.vision.method import PASSES, Job, VisionResult
from moqe.methods.vision.observe import observe
from moqe.methods.vision.output_error import error_notes
from moqe.methods.vision.ptq import ptq_layers, round_weight
from moqe.methods.vision.qat import learned_weight
from moqe.methods.vision.training import (
    Update,
    attach,
    step_group,
    train,
    trainable_copy,
    trained_weight,
    weight_groups,
)
from moqe.recipe import Expert
from moqe.schemes import Scheme


class DsConv:
    """Integer kernel blocks with float shifts."""

    def forward_passes(self, expert: Expert, images: int) -> float:
        """See `VisionMethod`."""
        return PASSES * images + 3 * expert.dsconv.steps * expert.dsconv.batch_size

    def fit(self, job: Job) -> VisionResult:
        """See `VisionMethod.fit`."""
        options = job.expert.dsconv
        layers = dsconv_layers(job)
        noted: dict[str, float] = {"steps": options.steps}
        if options.steps:
            student = trainable_copy(job.network)
            modules = dict(student.named_modules())
            groups, constraints = list[dict[str, Any]](), list[Update]()
            for layer in layers:
                module, weight = modules[layer.name], learned_weight(layer)
                assert isinstance(layer.input, BlockFloat)
                attach(module, weight, _StraightThrough(layer.input))
                groups += weight_groups(module, layer, options.learning_rate)
                groups.append(step_group(weight.step, options.learning_rate))
                constraints.append(weight.keep_positive)
            noted["final_loss"] = train(job, student, groups, constraints, options, what="adapting")
            layers = tuple(
                QuantizedLayer(layer.name, *trained_weight(modules[layer.name], layer), layer.input) for layer in layers
            )
        return VisionResult(layers, error_notes(job, layers, ptq_layers(job), **noted))


def dsconv_layers(job: Job) -> tuple[QuantizedLayer, ...]:
    """Every convolution as integer blocks and shifts, without training. Images only say which inputs can be negative.

    Raises UnsupportedLayer when the network has no convolution.
    """
    wanted = [site for site in job.sites if site.kind == "conv"]
    if not wanted:
        raise UnsupportedLayer("dsconv quantizes convolutions, and the network has none: use another method")
    inputs, _ = observe(job.network, [site.name for site in wanted], (), job.images, job.seed)
    block, bits = job.expert.dsconv.block, job.scheme.activation_bits
    modules, layers = dict(job.network.named_modules()), []
    for site in wanted:
        module = modules[site.name]
        assert isinstance(module, nn.Conv2d)
        bias = None if module.bias is None else module.bias.detach().cpu().clone()
        activation = BlockFloat(bits, block, inputs[site.name].lowest < 0.0, axis=1)
        codes = block_codes(module.weight.detach().cpu(), job.scheme, block)
        layers.append(QuantizedLayer(site.name, codes, bias, activation))
    return tuple(layers)


def block_codes(weight: Tensor, scheme: Scheme, block: int) -> WeightCodes:
    """A kernel, float32 (out, in / groups, kh, kw), as integers and one shift per block of input channels.

    A depth of one gets one shift per output channel.
    """
    outputs, depth, height, width = weight.shape
    if depth == 1:
        return round_weight(weight, replace(scheme, group_size=0))
    block = min(block, depth)
    rows = pad(weight.permute(0, 2, 3, 1).reshape(-1, depth), (0, -depth % block))  # (out * kh * kw, blocks * block)
    grouped = replace(scheme, group_size=block)
    codes = round_to_grid(rows, *searched_grid(rows, grouped, torch.float32), grouped).codes
    shifts = distribution_shift(rows.view(len(rows), -1, block), codes.view(len(rows), -1, block))
    return WeightCodes(
        codes[:, :depth].view(outputs, height, width, depth).permute(0, 3, 1, 2).contiguous(),
        shifts.view(outputs, height, width, -1).permute(0, 3, 1, 2).contiguous(),
        block,
        scheme.weight_bits,
    )


def distribution_shift(weight: Tensor, codes: Tensor) -> Tensor:
    """The factor of each block's integers with the least squared error: sum(w q) / sum(q q).

    weight: float32, (..., block). codes: integers, the same shape. Returns (...), 1 where all codes are zero.
    """
    integers = codes.to(torch.float32)
    square = integers.square().sum(-1)
    return torch.where(square > 0, (weight * integers).sum(-1) / square.clamp(min=1.0), torch.ones_like(square))


class _StraightThrough(nn.Module):
    """Block floating point whose gradient is the identity's."""

    def __init__(self, quantizer: BlockFloat) -> None:
        super().__init__()
        self.quantizer = quantizer

    def forward(self, x: Tensor) -> Tensor:
        return x + (self.quantizer(x.detach()) - x.detach())
