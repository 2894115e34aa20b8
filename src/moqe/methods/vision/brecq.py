"""brecq: learn block by block which way each weight is rounded, so that the block's output stays what it was.

Paper: Li, Gong, Tan, Yang, Hu, Zhang, Yu, Wang, Gu, "BRECQ: Pushing the Limit of Post-Training Quantization by Block
Reconstruction", ICLR 2021 (arXiv 2102.05426).

Faithful: blocks as the unit, learned rounding with its regularizer, output errors weighed by the diagonal of the Fisher
information, learned steps of the activations, inputs from the quantized part of the network and targets from the
full-precision one, first and last layer at 8 bits, no labels.
Different:
- The squared gradients are averaged over the calibration images, one map per block, found in a single backward pass
  through the full-precision network; the paper keeps them per image. They come from labels drawn from the network's own
  prediction, which is what the Fisher information asks for.
- Steps of the activations are learned together with the roundings instead of after them.
- The error is divided by that of rounding to nearest, so that the regularizer's weight means the same in all blocks.
- Hundreds of updates per block with a larger learning rate instead of 20,000.

Cost: `steps` forward and backward passes of each block alone; a pass over all images through each block, and one
through what lies before it where blocks do not form a chain (`walk.py`), in both networks. Memory: inputs and targets
of one block for all images.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn

from moqe.errors import UnsupportedLayer
from moqe.methods.vision.fisher import fisher_weights
from moqe.methods.vision.layer import QuantizedLayer, Uniform, WeightCodes, signed_range
from moqe.methods.vision.learned_rounding import LearnedRounding
from moqe.methods.vision.lsq import LearnedStep
from moqe.methods.vision.method import PASSES, Job, VisionResult
from moqe.methods.vision.output_error import error_notes, significant
from moqe.methods.vision.ptq import ptq_layers, with_int8_outputs
from moqe.methods.vision.qat import learned_activation, learned_input
from moqe.methods.vision.reconstruction import Reconstructed, Task, reconstruct
from moqe.methods.vision.training import attach, trainable_copy
from moqe.methods.vision.walk import followers, inputs_of, outputs_of
from moqe.recipe import Expert


class Brecq:
    """Block reconstruction with learned rounding."""

    def forward_passes(self, expert: Expert, images: int) -> float:
        """See `VisionMethod`."""
        # Fisher weights are a step of training; blocks and what lies before the last one are run in both networks.
        return (PASSES + 3 + 4) * images + 3 * expert.brecq.steps * expert.brecq.batch_size

    def fit(self, job: Job) -> VisionResult:
        """See `VisionMethod.fit`."""
        options, network, images = job.expert.brecq, job.network, job.images
        start = ptq_layers(job)
        members = _members(job.blocks, start)
        fisher = fisher_weights(network, job.blocks, images, job.seed)
        carried = followers(network, job.blocks, images.batch(torch.arange(min(2, len(images)))))
        student = trainable_copy(network)
        modules = dict(student.named_modules())
        generator = torch.Generator().manual_seed(job.seed)
        layers, outcomes = list[QuantizedLayer](), dict[str, Reconstructed]()
        inputs = targets = torch.empty(0)
        with job.progress.track(f"{job.expert.name}: reconstructing", options.steps * len(job.blocks)) as advance:
            for last, block in pairwise(("", *job.blocks)):
                exact = network.get_submodule(block)
                if block in carried:
                    inputs, targets = outputs_of(modules[last], inputs), outputs_of(exact, targets)
                else:
                    inputs = inputs_of(student, block, images)
                    targets = outputs_of(exact, inputs_of(network, block, images))
                roundings, steps = _attach(modules, members[block])
                task = Task(modules[block], roundings, steps, inputs, targets, fisher[block])
                outcome = reconstruct(task, options, generator, advance)
                for layer, rounding, step in zip(members[block], roundings, steps, strict=True):
                    outcomes[layer.name] = outcome
                    layers.append(_learned(layer, rounding, step))
                modules[block].requires_grad_(False)
        order = {layer.name: index for index, layer in enumerate(start)}
        layers.sort(key=lambda layer: order[layer.name])
        result = with_int8_outputs(job, layers)
        notes = error_notes(job, result, with_int8_outputs(job, start), steps=options.steps)
        for name, outcome in outcomes.items():
            notes[name] |= significant(
                {
                    "block_error": outcome.learned_error,
                    "block_error_nearest": outcome.nearest_error,
                    "settled": outcome.settled,
                }
            )
        return VisionResult(result, notes)


def _members(blocks: Sequence[str], layers: Sequence[QuantizedLayer]) -> dict[str, list[QuantizedLayer]]:
    """The layers of each block. Raises UnsupportedLayer when a layer is in no block or in two."""
    members = {
        block: [layer for layer in layers if layer.name == block or layer.name.startswith(f"{block}.")]
        for block in blocks
    }
    counts = [layer.name for inside in members.values() for layer in inside]
    if sorted(counts) != sorted(layer.name for layer in layers):
        raise UnsupportedLayer("brecq needs every layer in exactly one block: use another method for this network")
    return members


def _attach(
    modules: dict[str, nn.Module], layers: Sequence[QuantizedLayer]
) -> tuple[list[LearnedRounding], list[LearnedStep]]:
    """Put trainable roundings and steps on a block's layers."""
    roundings, steps = list[LearnedRounding](), list[LearnedStep]()
    for layer in layers:
        module = modules[layer.name]
        assert isinstance(module, nn.Conv2d | nn.Linear)
        assert isinstance(layer.input, Uniform)
        roundings.append(
            LearnedRounding(
                module.weight.detach(), layer.weight.scale.to(module.weight.device), *signed_range(layer.weight.bits)
            )
        )
        steps.append(learned_activation(layer.input, 1))
        attach(module, roundings[-1], steps[-1])
    return roundings, steps


def _learned(start: QuantizedLayer, rounding: LearnedRounding, step: LearnedStep) -> QuantizedLayer:
    codes = rounding.codes().to(torch.int8).cpu().contiguous()
    weight = WeightCodes(codes, start.weight.scale, 0, start.weight.bits)
    assert isinstance(start.input, Uniform)
    return QuantizedLayer(start.name, weight, start.bias, learned_input(step.step, start.input))
