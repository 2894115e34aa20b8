"""Image classifiers: images, experts of one or several full-precision models, top-1 and cross-entropy per image."""

from __future__ import annotations

import io
import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from moqe.data.classification import CLASS_METRICS, score_classes
from moqe.data.images import ImageSamples, make_image_splits
from moqe.data.preprocessing import Preprocessing
from moqe.data.protocols import WHOLE, Scored, SplitSamples, protocol_digest
from moqe.errors import ModelError
from moqe.folder import MixtureFolder
from moqe.formats.onnx_writer import write_onnx_expert
from moqe.methods.vision.check import check
from moqe.models.device import check_device
from moqe.models.estimate import Estimate
from moqe.models.image_features import backbone_features, stem_features
from moqe.models.image_shared import DESCRIPTION, ImageShared, write_image_shared
from moqe.progress import Progress
from moqe.recipe import Recipe
from moqe.router import Router, VectorFeatures, innermost
from moqe.router.network_router import NetworkRouter
from moqe.router.onnx_network import NETWORK, write_network
from moqe.runtimes.images import IMAGE_RUNTIMES, ImageRuntime, ReferenceImageRuntime
from moqe.store import read_json
from moqe.tasks.image_estimate import estimate_images
from moqe.tasks.image_expert_files import expert_file, expert_file_bytes
from moqe.tasks.image_expert_maker import ImageExpertMaker
from moqe.tasks.image_models import ImageModels
from moqe.tasks.task import ExpertFacts

log = logging.getLogger("moqe")

BASE = "base"
BATCH_IMAGES = 64
THUMBNAIL = 128  # pixels a side, at most
ROUTER_METRICS = {"cross_entropy": "cross_entropy", "zero_one": "top1"}


class ImageTask:
    """An image classifier and its experts. Satisfies `Task`."""

    metrics = CLASS_METRICS
    modality = "image"
    protocols: tuple[str, ...] = (WHOLE,)
    chunk_samples = 256

    def __init__(self, recipe: Recipe, folder: Path, device: str = "cpu") -> None:
        self.recipe, self.folder, self.device = recipe, MixtureFolder(folder), device
        self.schemes = {expert.name: check(expert) for expert in recipe.experts}
        check_device(device)
        self.models = ImageModels(recipe, device)
        self.classes = self.models.classes
        self.feature_expert = recipe.experts[0].name if recipe.router.feature == "backbone" else None
        self.runtime_name: str = recipe.runtime
        self.router_metric = ROUTER_METRICS[recipe.router.loss]
        self._runtimes: dict[str, ImageRuntime] = {}
        self._vectors: dict[str, Tensor] = {}

    @property
    def metric(self) -> str:
        """The metric that the verdict judges."""
        return self.metrics[0]

    @classmethod
    def predict(cls, recipe: Recipe, device: str, progress: Progress) -> Estimate:
        """What a build would take, from the models and the recipe's numbers of images."""
        check_device(device)
        schemes = {expert.name: check(expert) for expert in recipe.experts}
        return estimate_images(recipe, schemes, ImageModels(recipe, device), device, progress)

    @cached_property
    def _splits(self) -> dict[str, ImageSamples]:
        labels = self.models.base.labels
        return make_image_splits(self.recipe.data, labels, self.models.base.classes, self.recipe.seed)

    def splits(self) -> Mapping[str, ImageSamples]:
        """`calibration`, `router_train`, `router_validation` and `test`: disjoint images."""
        return self._splits

    def describe(self, split: str) -> SplitSamples:
        """What the loss table records about a split beside losses."""
        samples = self._splits[split]
        return SplitSamples(
            samples.document,
            samples.domain,
            samples.digest,
            {WHOLE: np.zeros(len(samples), np.int64)},
            {WHOLE: protocol_digest(WHOLE, 1)},
            samples.labels.numpy(),
        )

    def identity(self, progress: Progress) -> dict[str, str]:
        """Digests of everything that decides the result beside the recipe."""
        with progress.track("read images", 1) as advance:
            log.info("images are preprocessed so: %s", self.models.base.preprocessing.describe())
            advance(len(self._splits) and 1)
        samples = {f"samples.{name}": split.digest for name, split in self._splits.items()}
        return {**self.models.digests(), **samples}

    def disk_bytes_needed(self) -> int:
        """Bytes that making the missing experts will take."""
        missing = [name for name in self.schemes if not self.folder.certificate(name).exists()]
        return sum(expert_file_bytes(self.models.folded(name), self.schemes[name]) for name in missing)

    def make_experts(self, progress: Progress) -> None:
        """Quantize what is not yet on disk, expert by expert."""
        samples = self._splits["calibration"]
        maker = ImageExpertMaker(self.recipe, self.schemes, self.models, self.folder)
        maker.run(samples, lambda: self.features("calibration", WHOLE), progress)
        if not (self.folder.shared / DESCRIPTION).exists():
            base = self.models.folded(BASE)
            names = (BASE, *self.schemes)
            shared = ImageShared(self.classes, {name: self.models.of(name).preprocessing for name in names})
            shape = tuple(base.example.shape[1:])
            write_image_shared(self.folder.shared, shared, base.network, self._first_convolution, shape)

    @property
    def _first_convolution(self) -> str:
        """What the stem ends with. Raises ModelError for a base model without one."""
        found = next((site.name for site in self.models.folded(BASE).sites if site.kind == "conv"), None)
        if found is None:
            raise ModelError(f"{self.recipe.base} has no convolution: use router.feature backbone")
        return found

    def losses(self, expert: str, split: str, rows: Sequence[int]) -> Scored:
        """What an expert (or `base`) does on the images of a split at `rows`."""
        samples = self._splits[split].select(rows)
        runtime, preprocessing = self._runtime(expert), self.models.of(expert).preprocessing
        parts = torch.split(torch.arange(len(samples)), BATCH_IMAGES)
        logits = torch.cat([runtime.logits(_pixels(samples, part, preprocessing, self.device)) for part in parts])
        return score_classes(logits, samples.labels)

    def _runtime(self, expert: str) -> ImageRuntime:
        """What scores an expert or the base model; one is in memory at a time."""
        if expert not in self._runtimes:
            self._runtimes.clear()
            self._runtimes[expert] = self._open(expert, self.runtime_name)
        return self._runtimes[expert]

    def _open(self, expert: str, runtime: str) -> ImageRuntime:
        folded = self.models.folded(expert)
        if expert != BASE:
            return IMAGE_RUNTIMES[runtime](folded.network, expert_file(self.folder.expert(expert)))
        if runtime == ReferenceImageRuntime.name:
            return ReferenceImageRuntime(folded.classifier.network, None)
        path = self.folder.work / "base.onnx"
        if not path.exists():
            write_onnx_expert(path, folded.network, (), tuple(folded.example.shape[1:]))
        return IMAGE_RUNTIMES[runtime](folded.network, path)

    def features(self, split: str, protocol: str) -> VectorFeatures:
        """The pooled first stage of the base model, or the first expert's penultimate features."""
        if split not in self._vectors:
            samples = self._splits[split]
            parts = torch.split(torch.arange(len(samples)), BATCH_IMAGES)
            self._vectors[split] = torch.cat([self._features_of(samples, part) for part in parts])
        return VectorFeatures(self._vectors[split], self.device)

    def _features_of(self, samples: ImageSamples, rows: Tensor) -> Tensor:
        if self.feature_expert is None:
            base = self.models.folded(BASE)
            pixels = _pixels(samples, rows, base.classifier.preprocessing, self.device)
            return stem_features(base.network, self._first_convolution, pixels)
        folded = self.models.folded(self.feature_expert)
        network = ReferenceImageRuntime(folded.network, expert_file(self.folder.expert(self.feature_expert))).network
        pixels = _pixels(samples, rows, folded.classifier.preprocessing, self.device)
        return backbone_features(network, folded.sites[-1].name, pixels)

    def deploy(self, router: Router, folder: Path) -> None:
        """The router's network, if it has one, as an ONNX file."""
        inner = innermost(router)
        if isinstance(inner, NetworkRouter):
            write_network(folder / NETWORK, inner.network, self.features("router_validation", WHOLE).dimension)

    def picture(self, split: str, row: int) -> bytes | None:
        """A sample as a PNG, at most 128 pixels a side."""
        picture = self._splits[split].picture(row)
        picture.thumbnail((THUMBNAIL, THUMBNAIL))
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        return buffer.getvalue()

    def facts(self) -> dict[str, ExpertFacts]:
        """Size and certificate of every expert, and the size of `base` in float32."""
        base_bytes = sum(4 * parameter.numel() for parameter in self.models.base.network.parameters())
        experts = {
            expert.name: ExpertFacts(
                expert_file(self.folder.expert(expert.name)).stat().st_size,
                read_json(self.folder.certificate(expert.name)),
            )
            for expert in self.recipe.experts
        }
        return {BASE: ExpertFacts(base_bytes, {}), **experts}


def _pixels(samples: ImageSamples, rows: Tensor, preprocessing: Preprocessing, device: str) -> Tensor:
    """Preprocessed images, float32, (b, 3, h, w)."""
    return samples.pixels(rows.tolist(), preprocessing).to(device)
