"""qat: train weights, biases and step sizes through the rounding (learned step size quantization).

Paper: Esser, McKinstry, Bablani, Appuswamy, Modha, "Learned Step Size Quantization", ICLR 2020 (arXiv 1902.08153).

Faithful: the step's gradient and its scale 1 / sqrt(n * highest), straight-through gradients of weights and inputs,
both trained together from the pre-trained network, a cosine schedule, first and last layer at 8 bits.
Different:
- The loss is KL to the full-precision network's own logits, no labels. The paper uses labels, on the whole training
  set; few calibration images are images that the network has learned by heart, where the labels' loss is nearly zero
  and its gradient says little (`loss: labels` for the paper's).
- Batch norms are folded before training, and the biases train: statistics stay those of the full-precision network.
- Weights have one step per output channel (the paper: per layer), activations one per tensor as in the paper. Inputs
  that can be negative keep the zero point that calibration found.
- Steps start from ptq's error-minimising ones, not from 2 <|v|> / sqrt(highest).
- Adam with learning rates relative to the steps (`training.py`) instead of SGD: a minute on few images, not 90 epochs.

Cost: a forward and a backward pass per step and image, half as much again for rounding.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from moqe.methods.vision.layer import QuantizedLayer, Uniform, signed_range
from moqe.methods.vision.lsq import LearnedStep
from moqe.methods.vision.method import PASSES, Job, VisionResult
from moqe.methods.vision.output_error import error_notes
from moqe.methods.vision.ptq import ptq_layers, with_int8_outputs
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


class Qat:
    """Quantization-aware training with learned steps."""

    def forward_passes(self, expert: Expert, images: int) -> float:
        """See `VisionMethod`."""
        return PASSES * images + 3 * expert.qat.steps * expert.qat.batch_size

    def fit(self, job: Job) -> VisionResult:
        """See `VisionMethod.fit`."""
        options = job.expert.qat
        start = ptq_layers(job)
        student = trainable_copy(job.network)
        modules = dict(student.named_modules())
        features = {site.name: torch.Size(site.input_shape).numel() for site in job.sites}
        activations = dict[str, LearnedStep]()
        groups, constraints = list[dict[str, Any]](), list[Update]()
        for layer in start:
            assert isinstance(layer.input, Uniform)
            module, weight = modules[layer.name], learned_weight(layer)
            activation = learned_activation(layer.input, features[layer.name])
            attach(module, weight, activation)
            groups += weight_groups(module, layer, options.learning_rate)
            groups += [step_group(each.step, options.learning_rate) for each in (weight, activation)]
            constraints += [weight.keep_positive, activation.keep_positive]
            activations[layer.name] = activation
        last_loss = train(job, student, groups, constraints, options, options.loss)
        layers = tuple(
            QuantizedLayer(
                layer.name,
                *trained_weight(modules[layer.name], layer),
                learned_input(activations[layer.name].step, cast(Uniform, layer.input)),
            )
            for layer in start
        )
        layers, plain = with_int8_outputs(job, layers), with_int8_outputs(job, start)
        notes = error_notes(job, layers, plain, steps=options.steps, final_loss=last_loss)
        return VisionResult(layers, notes)


def learned_weight(start: QuantizedLayer) -> LearnedStep:
    """A trainable quantizer that starts where a plainly quantized layer's weight is."""
    weight = start.weight
    count = weight.codes.numel() // weight.scale.numel()
    return LearnedStep(weight.scale, *signed_range(weight.bits), count, weight.block)


def learned_activation(start: Uniform, features: int) -> LearnedStep:
    """A trainable quantizer that starts where a calibrated input is; features: elements of one image's input."""
    low, high = (bound - start.zero_point for bound in start.levels)
    return LearnedStep(torch.tensor(start.scale), low, high, features)


def learned_input(step: Tensor, start: Uniform) -> Uniform:
    """What a trained input quantizer has become."""
    return Uniform(float(step.detach()), start.zero_point, start.bits)
