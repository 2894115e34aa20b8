"""n2uq: train where the thresholds between activation levels lie, with evenly spaced levels behind them.

Paper: Liu, Cheng, Huang, Xing, Shen, "Nonuniform-to-Uniform Quantization: Towards Accurate Quantization via Generalized
Straight-Through Estimation", CVPR 2022 (arXiv 2111.14826).

Faithful: learned intervals with the generalised straight-through gradient, a learned scale behind the levels,
distillation from the full-precision network, first and last layer in full precision.
Different:
- Weights have learned steps as in qat. The paper's entropy-preserving grid (`weights: entropy`: the step of an output
  channel follows its mean |w|, so that all codes are used about equally often) cuts off every weight beyond twice the
  mean. Networks trained from the start for many epochs adapt to that; a trained one loses everything at first, and a
  minute does not bring it back. That grid contains zero here, as integer kernels want it; the paper's lies half a step
  off.
- Thresholds start evenly spaced where calibration put them (the paper: on [0, 2]) and batch norms are folded; no
  learnable biases or PReLUs are added, the network stays the one it was.
- Thresholds lie on a 16-bit grid over 1.5 times the calibrated range, while training and in the file.
- Adam with rates relative to the steps, on calibration images only.

Cost: a forward and a backward pass per step and image, and as much again for thresholds.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from moqe.methods.vision.layer import QuantizedLayer, Uniform, signed_range
from moqe.methods.vision.learned_thresholds import LearnedThresholds
from moqe.methods.vision.lsq import LearnedStep
from moqe.methods.vision.method import PASSES, Job, VisionResult
from moqe.methods.vision.output_error import error_notes
from moqe.methods.vision.ptq import ptq_layers
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

THRESHOLD_SHARE = 1.0  # learning rate of thresholds and output scales, in levels, as a share of the weights' in steps


class EntropyWeight(nn.Module):
    """Rounds a weight to steps of mean |w| / 2^(bits - 2) per output channel; gradients pass straight through.

    A Laplacian or uniform weight then uses its 2^bits codes about equally: they reach to twice the mean.
    """

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits

    def forward(self, weight: Tensor) -> Tensor:
        """The rounded weight, float32, (out, ...)."""
        with torch.no_grad():
            codes, step = self.codes(weight)
            difference = codes.mul_(step.view(-1, *[1] * (weight.ndim - 1))).sub_(weight)
        return weight + difference

    @torch.no_grad()
    def codes(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Codes as float32, (out, ...), and the step of each channel, (out,)."""
        step = weight.abs().mean(tuple(range(1, weight.ndim)), keepdim=True) / 2 ** (self.bits - 2)
        step = torch.where(step > 0, step, torch.ones_like(step))
        return (weight / step).round_().clamp_(*signed_range(self.bits)), step.flatten()


class N2uq:
    """Learned thresholds in front of evenly spaced levels."""

    def forward_passes(self, expert: Expert, images: int) -> float:
        """See `VisionMethod`."""
        return PASSES * images + 3 * expert.n2uq.steps * expert.n2uq.batch_size

    def fit(self, job: Job) -> VisionResult:
        """See `VisionMethod.fit`."""
        options = job.expert.n2uq
        plain = ptq_layers(job)
        start = [layer for layer in plain if layer.name not in (job.sites[0].name, job.sites[-1].name)]
        student = trainable_copy(job.network)
        modules = dict(student.named_modules())
        thresholds = dict[str, LearnedThresholds]()
        groups, constraints = list[dict[str, Any]](), list[Update]()
        for layer in start:
            assert isinstance(layer.input, Uniform)
            module, weight = modules[layer.name], weight_quantizer(layer, options.weights)
            thresholds[layer.name] = LearnedThresholds(layer.input)
            attach(module, weight, thresholds[layer.name])
            groups += weight_groups(module, layer, options.learning_rate)
            groups.append(threshold_group(thresholds[layer.name], options.learning_rate))
            constraints.append(thresholds[layer.name].keep_valid)
            if isinstance(weight, LearnedStep):
                groups.append(step_group(weight.step, options.learning_rate))
                constraints.append(weight.keep_positive)
        last_loss = train(job, student, groups, constraints, options)
        layers = tuple(
            QuantizedLayer(layer.name, *trained_weight(modules[layer.name], layer), thresholds[layer.name].stored())
            for layer in start
        )
        notes = error_notes(job, layers, plain, steps=options.steps, final_loss=last_loss)
        return VisionResult(layers, notes)


def weight_quantizer(start: QuantizedLayer, grid: Literal["learned", "entropy"]) -> EntropyWeight | LearnedStep:
    """The trainable weight quantizer for a plainly quantized layer."""
    return EntropyWeight(start.weight.bits) if grid == "entropy" else learned_weight(start)


def threshold_group(thresholds: LearnedThresholds, rate: float) -> dict[str, Any]:
    """Adam's group for a layer's thresholds and output scale, all measured in output levels."""
    scale = float(thresholds.scale.detach())
    return {"params": list(thresholds.parameters()), "lr": THRESHOLD_SHARE * rate * scale}
