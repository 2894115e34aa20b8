"""From calibration images to expert files: one method after the other, each expert an ONNX file and a certificate.

Unlike the language methods these learn by gradients, each from its own runs over the images, so nothing is shared
between experts but the folded network. An expert whose certificate is there is whole and is not made again.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import torch

from moqe.data.images import ImageSamples, PreparedImages
from moqe.folder import MixtureFolder
from moqe.formats.onnx_biases import integer_biases
from moqe.formats.onnx_writer import write_onnx_expert
from moqe.methods.certificate import LayerRecord, certify, significant
from moqe.methods.vision import VISION_METHODS, Job, VisionResult
from moqe.models.convolutions import LayerSite
from moqe.progress import Progress
from moqe.recipe import Expert, Recipe
from moqe.schemes import Scheme
from moqe.store import write_json
from moqe.tasks.image_models import FoldedClassifier, ImageModels

log = logging.getLogger("moqe")

BASELINE = "ptq"
FULL_PRECISION = 32.0


def expert_file(folder: Path) -> Path:
    """The file of an image expert in its folder."""
    return folder / "model.onnx"


def expert_file_bytes(folded: FoldedClassifier, scheme: Scheme) -> int:
    """About how many bytes an expert's file takes: weights at their width, everything else in float32."""
    return int(folded.weights * scheme.weight_bits / 8 + 4 * (folded.parameters - folded.weights)) + 2**17


class ImageExpertMaker:
    """Makes the experts of a recipe in a mixture's folder. schemes: the number format of every expert."""

    def __init__(
        self, recipe: Recipe, schemes: Mapping[str, Scheme], models: ImageModels, folder: MixtureFolder
    ) -> None:
        self.recipe, self.schemes, self.models, self.folder = recipe, schemes, models, folder

    def run(self, samples: ImageSamples, progress: Progress) -> None:
        """Make every expert that is not complete. Raises what methods, formats and the models raise."""
        for expert in self.recipe.experts:
            if not self.folder.certificate(expert.name).exists():
                self._make(expert, samples, progress)

    def _make(self, expert: Expert, samples: ImageSamples, progress: Progress) -> None:
        folded, scheme = self.models.folded(expert.name), self.schemes[expert.name]
        device = folded.example.device
        images = PreparedImages(samples, folded.classifier.preprocessing, device)
        job = Job(folded.network, folded.sites, folded.blocks, images, scheme, expert, self.recipe.seed, progress)
        result = VISION_METHODS[expert.method].fit(job)
        certificate = certify(
            expert, records(expert, scheme, folded.sites, result, len(images)), calibrated=expert.method != BASELINE
        )
        write_onnx_expert(
            expert_file(self.folder.expert(expert.name)),
            folded.network,
            integer_biases(result.layers),
            tuple(folded.example.shape[1:]),
            {"moqe.expert": expert.name, "moqe.method": expert.method, "moqe.scheme": expert.scheme},
        )
        write_json(self.folder.certificate(expert.name), certificate.to_json())


def records(
    expert: Expert, scheme: Scheme, sites: tuple[LayerSite, ...], result: VisionResult, images: int
) -> list[LayerRecord]:
    """What the certificate says of every layer that could be quantized, in the order they run."""
    made = {layer.name: layer for layer in result.layers}
    found = []
    for site in sites:
        layer, notes = made.get(site.name), dict(result.notes.get(site.name, {}))
        parameters = int(torch.Size(site.weight_shape).numel())
        bits = FULL_PRECISION
        if layer is not None:
            bits = layer.weight.bits + 32 * layer.weight.scale.numel() / parameters
        error, baseline = notes.pop("error", None), notes.pop("ptq_error", None)
        found.append(
            LayerRecord(
                name=f"{site.name}.weight",
                method_asked=expert.method,
                method_used=expert.method if layer is not None else "keep",
                scheme_asked=expert.scheme,
                scheme_used=scheme_of(layer.weight.bits, scheme) if layer is not None else "float32",
                group_size=0 if layer is None else layer.weight.block,
                parameters=parameters,
                bits_per_weight=round(bits, 4),
                seen=float(images),
                error=None if error is None else significant(error),
                baseline_error=None if baseline is None else significant(baseline),
                equals_baseline=error is not None and error == baseline,
                notes={name: significant(value) for name, value in notes.items()},
            )
        )
    return found


def scheme_of(weight_bits: int, asked: Scheme) -> str:
    """The scheme that a layer of so many weight bits really has; first and last layers often have 8."""
    if weight_bits == asked.weight_bits:
        return asked.name
    return f"w{weight_bits}a{max(weight_bits, asked.activation_bits)}"
