"""Training everything of a quantized network but its integer codes: what specialists that share codes differ in.

Scales of weights, one per output channel, biases, and the steps of inputs are trained end to end to say what the
full-precision network says, as qat trains its steps (`training.py`), whichever method made the codes. The gradient of
a scale is the plain one: a rounded weight is code times scale.

Cost: a forward and a backward pass per update and image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from moqe.method_options import Qat
from moqe.methods.vision.layer import QuantizedLayer, Uniform, signed_range
from moqe.methods.vision.lsq import SMALLEST_STEP
from moqe.methods.vision.method import Job, VisionResult
from moqe.methods.vision.output_error import error_notes
from moqe.methods.vision.ptq import ptq_layers, with_int8_outputs
from moqe.methods.vision.qat import learned_activation, learned_input
from moqe.methods.vision.training import Update, attach, train, trainable_copy, trained_weight
from moqe.recipe import Expert

SCALE_RATE = 0.5  # of `learning_rate`, relative to a scale: codes that cannot move leave more to it than in qat


class FixedCodes(nn.Module):
    """Codes times trained scales; a parametrization that ignores the weight it is attached to.

    codes: (out, ...). step: the scales, (out,).
    """

    fixed: Tensor

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("fixed", codes.to(torch.float32))
        self.step = nn.Parameter(scale.detach().clone())

    def forward(self, weight: Tensor) -> Tensor:
        """The weight that the codes stand for, (out, ...)."""
        return self.fixed * self.step.view(-1, *[1] * (self.fixed.ndim - 1))

    @torch.no_grad()
    def codes(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """See `training.WeightQuantizer`."""
        return self.fixed, self.step.detach().clone()

    @torch.no_grad()
    def keep_positive(self) -> None:
        """Call after every update."""
        self.step.clamp_(min=SMALLEST_STEP)


def rescale(job: Job, start: Sequence[QuantizedLayer]) -> VisionResult:
    """Train scales, biases and input steps of `start`, whose scales are per channel and whose inputs are `Uniform`.

    Updates, batches and rate are those of the expert's method. Raises NumericalError as `train` does.
    """
    options = scale_options(job.expert)
    student = trainable_copy(job.network)
    modules = dict(student.named_modules())
    features = {site.name: torch.Size(site.input_shape).numel() for site in job.sites}
    groups, constraints, activations = list[dict[str, Any]](), list[Update](), dict[str, Any]()
    for layer in start:
        module = modules[layer.name]
        assert isinstance(module, nn.Conv2d | nn.Linear)
        assert isinstance(layer.input, Uniform)
        assert not layer.weight.block
        if layer.bias is not None and module.bias is not None:
            module.bias.data.copy_(layer.bias)
        weight = FixedCodes(layer.weight.codes, layer.weight.scale)
        activation = learned_activation(layer.input, features[layer.name])
        attach(module, weight, activation)
        for step in (weight.step, activation.step):
            rate = SCALE_RATE * options.learning_rate * float(step.detach().abs().mean())
            groups.append({"params": [step], "lr": rate})
        if layer.bias is not None and float(layer.bias.abs().max()) > 0:
            highest = signed_range(layer.weight.bits)[1]
            rate = options.learning_rate * float(layer.bias.abs().max()) / highest
            groups.append({"params": [module.bias], "lr": rate})
        constraints += [weight.keep_positive, activation.keep_positive]
        activations[layer.name] = activation
    last_loss = train(job, student, groups, constraints, options, options.loss, "training scales")
    layers = with_int8_outputs(
        job,
        [
            QuantizedLayer(
                layer.name,
                *trained_weight(modules[layer.name], layer),
                learned_input(activations[layer.name].step, cast(Uniform, layer.input)),
            )
            for layer in start
        ],
    )
    plain = with_int8_outputs(job, ptq_layers(job))
    return VisionResult(layers, error_notes(job, layers, plain, scale_steps=options.steps, final_loss=last_loss))


def scale_options(expert: Expert) -> Qat:
    """How scales are trained: as qat, with the number of updates of the method that made the codes."""
    if expert.method == "qat":
        return expert.qat
    return Qat(steps=expert.brecq.steps, batch_size=expert.brecq.batch_size)
