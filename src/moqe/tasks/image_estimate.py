"""What building an image mixture will take: forward passes counted, one of them measured.

Time is the number of images each step pushes through a network times a measured forward pass; a step of training counts
as three of them, and quantizing weights and inputs on the way as half as much again. Expect the right order, within a
factor of two. Training of routers is not included. Memory is that of one network with its gradients and moments and one
batch of activations; disk is exact but for the graph around the weights.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch

from moqe.data.images import make_image_splits
from moqe.methods.vision import VISION_METHODS
from moqe.models.estimate import FLOAT32, PROCESS_BYTES, Estimate
from moqe.progress import Progress
from moqe.recipe import Recipe
from moqe.schemes import Scheme
from moqe.tasks.image_expert_files import expert_file_bytes
from moqe.tasks.image_models import FoldedClassifier, ImageModels
from moqe.tasks.image_specialists import family_passes

BASE = "base"
FAKE_QUANTIZATION = 1.5
TRAINED_COPIES = 5  # weights, gradients, two moments and the full-precision network beside them
ACTIVATION_BATCH = 64
_MEASURED_SECONDS = 0.5


def estimate_images(
    recipe: Recipe, schemes: Mapping[str, Scheme], models: ImageModels, device: str, progress: Progress
) -> Estimate:
    """Predict what making and scoring a recipe's experts takes.

    schemes: by expert name. The images themselves are read only where the recipe does not limit their number. A model
    that several experts share is measured once. Raises what opening models and reading data raise.
    """
    data = recipe.data
    limits = (data.calibration_samples, data.router_samples, data.test_samples)
    if None in limits:
        splits = make_image_splits(data, models.base.labels, models.base.classes, recipe.seed)
        calibration, test = len(splits["calibration"]), len(splits["test"])
        router = len(splits["router_train"]) + len(splits["router_validation"])
    else:
        calibration, router, test = (limit or 0 for limit in limits)
    folded = {name: models.folded(name) for name in (BASE, *schemes)}
    measured: dict[int, float] = {}
    with progress.track("measure the models", len({id(one) for one in folded.values()})) as advance:
        for one in folded.values():
            if id(one) not in measured:
                measured[id(one)] = forward_seconds(one)
                advance(1)
    seconds = {name: measured[id(one)] for name, one in folded.items()}
    passes = {
        expert.name: VISION_METHODS[expert.method].forward_passes(expert, calibration) for expert in recipe.experts
    } | family_passes(recipe, calibration)
    making = {name: seconds[name] * FAKE_QUANTIZATION * count for name, count in passes.items()}
    sizes = {name: expert_file_bytes(folded[name], scheme) for name, scheme in schemes.items()}
    largest = max(folded.values(), key=lambda one: one.parameters)
    scored = (router + test) * (seconds[BASE] + FAKE_QUANTIZATION * sum(seconds[name] for name in schemes))
    return Estimate(
        parameters=folded[BASE].parameters,
        ram_bytes=PROCESS_BYTES
        + FLOAT32 * (TRAINED_COPIES * largest.parameters + ACTIVATION_BATCH * 3 * activation_numbers(largest)),
        disk_bytes=sum(sizes.values()),
        work_bytes=max(sizes.values()),
        expert_bytes=sizes,
        seconds={"quantize": sum(making.values()), "score": scored},
    )


def activation_numbers(folded: FoldedClassifier) -> int:
    """Numbers that all layers of a network read for one image."""
    return sum(int(torch.Size(site.input_shape).numel()) for site in folded.sites)


@torch.no_grad()
def forward_seconds(folded: FoldedClassifier) -> float:
    """Seconds of a forward pass of one image, in a batch, in float32; measured for half a second."""
    folded.network(folded.example)
    passes, start = 0, time.perf_counter()
    while time.perf_counter() - start < _MEASURED_SECONDS:
        folded.network(folded.example)
        passes += 1
    return (time.perf_counter() - start) / (passes * len(folded.example))
