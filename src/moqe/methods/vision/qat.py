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

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moqe.methods.vision.layer import QuantizedLayer, Uniform, WeightCodes, signed_range
from moqe.methods.vision.lsq import LearnedStep
from moqe.methods.vision.method import CalibrationImages, VisionResult
from moqe.methods.vision.observe import with_outputs
from moqe.methods.vision.output_error import error_notes
from moqe.methods.vision.ptq import integer_only, output_names, ptq_layers
from moqe.methods.vision.training import attach, logits_of, original_weight, train, trainable_copy
from moqe.models.convolutions import LayerSite
from moqe.progress import Progress
from moqe.recipe import Expert
from moqe.schemes import Scheme

STEP_SHARE = 0.1  # learning rate of a step, relative to itself, as a share of the weights' in steps


class Qat:
    """Quantization-aware training with learned steps."""

    name = "qat"
    trained = True

    def supports(self, scheme: Scheme) -> str:
        """Integer schemes with quantized activations."""
        return integer_only(scheme)

    def fit(
        self,
        network: nn.Module,
        sites: Sequence[LayerSite],
        blocks: Sequence[str],
        images: CalibrationImages,
        scheme: Scheme,
        expert: Expert,
        seed: int,
        progress: Progress,
    ) -> VisionResult:
        """See `VisionMethod.fit`."""
        options = expert.qat
        start = ptq_layers(network, sites, images, scheme, seed)
        student = trainable_copy(network)
        modules = dict(student.named_modules())
        features = {site.name: _features(site) for site in sites}
        quantizers = list[LearnedStep]()
        groups = list[dict[str, Any]]()
        for layer in start:
            weight, activation = learned_steps(layer, features[layer.name])
            attach(modules[layer.name], weight, activation)
            quantizers += [weight, activation]
            groups += _groups(modules[layer.name], layer, weight, activation, options.learning_rate)
        last_loss = train(
            student,
            logits_of(network, images),
            images,
            groups,
            steps=options.steps,
            batch_size=options.batch_size,
            loss=options.loss,
            seed=seed,
            constraints=[quantizer.keep_positive for quantizer in quantizers],
            what=f"{expert.name}: training",
            progress=progress,
        )
        layers = tuple(trained_layer(modules[layer.name], layer) for layer in start)
        layers = with_outputs(network, layers, output_names(sites, scheme), images, seed)
        plain = with_outputs(network, start, output_names(sites, scheme), images, seed)
        notes = error_notes(network, layers, plain, images)
        for note in notes.values():
            note.update(steps=options.steps, final_loss=float(f"{last_loss:.6g}"))
        return VisionResult(layers, notes)


def learned_steps(layer: QuantizedLayer, features: int) -> tuple[LearnedStep, LearnedStep]:
    """Trainable quantizers that start where a plainly quantized layer is: its weight's and its input's."""
    assert isinstance(layer.input, Uniform)
    codes = layer.weight.codes
    lowest, highest = signed_range(layer.weight.bits)
    shape = (-1, *[1] * (codes.ndim - 1))
    weight = LearnedStep(layer.weight.scale.view(shape), lowest, highest, codes[0].numel())
    low, high = (bound - layer.input.zero_point for bound in layer.input.levels)
    return weight, LearnedStep(torch.tensor(layer.input.scale), low, high, features)


def learned_input(step: Tensor, start: Uniform) -> Uniform:
    """What a trained input quantizer has become."""
    return Uniform(float(step.detach()), start.zero_point, start.bits)


@torch.no_grad()
def trained_layer(module: nn.Module, start: QuantizedLayer) -> QuantizedLayer:
    """The quantized layer that a trained module stands for, number for number."""
    weight, activation = module.parametrizations["weight"][0], module.input_quantizer  # type: ignore[index]
    assert isinstance(weight, LearnedStep)
    assert isinstance(activation, LearnedStep)
    assert isinstance(start.input, Uniform)
    value = original_weight(module)
    codes = (value / weight.step).round_().clamp_(weight.lowest, weight.highest).to(torch.int8).cpu().contiguous()
    bias = _plain(module.bias) if isinstance(module.bias, Tensor) else None
    scale = _plain(weight.step).flatten()
    return QuantizedLayer(
        start.name, WeightCodes(codes, scale, 0, start.weight.bits), bias, learned_input(activation.step, start.input)
    )


def _groups(
    module: nn.Module, layer: QuantizedLayer, weight: LearnedStep, activation: LearnedStep, rate: float
) -> list[dict[str, Any]]:
    """Adam's groups of one layer; see `training.py` for what learning rates mean."""
    groups = [
        {"params": [original_weight(module)], "lr": rate * float(layer.weight.scale.mean())},
        {"params": [weight.step], "lr": STEP_SHARE * rate * float(layer.weight.scale.mean())},
        {"params": [activation.step], "lr": STEP_SHARE * rate * float(activation.step.detach())},
    ]
    if layer.bias is not None and float(layer.bias.abs().max()) > 0:
        groups.append({"params": [module.bias], "lr": rate * float(layer.bias.abs().max()) / weight.highest})
    return groups


def _features(site: LayerSite) -> int:
    """Elements of the input of one image."""
    return int(torch.Size(site.input_shape).numel())


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().clone().contiguous()
