"""An image mixture from its folder: route an image, name what it shows.

    mixture = moqe.load("out/digits")
    mixture.classify("three.png").label

Experts run in ONNX Runtime, int8 layers in integers, whatever runtime measured the verdict; nothing outside the folder
is needed. The exception is a router that sees an expert's penultimate features (`feature: backbone`): these come from
the reference runtime, which opens the full-precision model that the recipe names.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moqe.data.decoding import decode
from moqe.errors import DataError, MoqeError
from moqe.mixture.mixture import Decision, Mixture
from moqe.models.image_features import backbone_features
from moqe.models.image_shared import STEM, ImageShared, read_image_shared
from moqe.progress import Progress
from moqe.router import Cascade, Router, VectorFeatures, innermost, load_cascade, load_router, with_innermost
from moqe.router.baselines import Constant
from moqe.router.network_router import NetworkRouter
from moqe.router.onnx_network import NETWORK, OnnxNetwork
from moqe.runtimes.images import ReferenceImageRuntime
from moqe.runtimes.onnx import OnnxRuntime
from moqe.tasks.image_expert_files import expert_file
from moqe.tasks.image_models import ImageModels

BASE = "base"
SHOWN_CLASSES = 5


@dataclass(frozen=True)
class Classification:
    """What an image shows.

    label, index: the likeliest class. probability: its own. top: the five likeliest classes with their probabilities,
    those of them with the same label with their index behind it.
    expert: who answered first; second: who was asked because the first was unsure, None if nobody was, and then the
    probabilities are the mean of both. cost: forward passes of an expert. reason: why this expert.
    """

    label: str
    index: int
    probability: float
    top: Mapping[str, float]
    expert: str
    second: str | None
    cost: float
    reason: str


class ImageMixture(Mixture):
    """A mixture of image classifiers; see `Mixture` for opening one.

    Raises MissingExtra without the packages of the extra `vision`.
    """

    def __init__(
        self,
        folder: Path | str,
        device: str = "cpu",
        progress: Progress | None = None,
        runtime: str | None = None,
    ) -> None:
        if runtime not in (None, "onnx"):
            raise MoqeError(f"a mixture for images runs in onnx, not in {runtime!r}: leave the runtime out")
        super().__init__(folder, device, progress)
        self._runtimes: dict[str, OnnxRuntime] = {}

    def _read_shared(self) -> None:
        self._shared: ImageShared = read_image_shared(self.folder.shared)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes."""
        return self._shared.classes

    def route(self, sample: Path | str | bytes, protocol: str | None = None) -> Decision:
        """Choose an expert for an image: a path, or an encoded file's bytes.

        Raises DataError when it is no readable image, MoqeError for a protocol the mixture has no router for.
        """
        return self._route(_Picture.of(sample), protocol)

    def classify(self, image: Path | str | bytes, expert: str | None = None) -> Classification:
        """Name what an image shows, with the routed expert and the mixture's policy, or with `expert` alone.

        image: a path, or an encoded file's bytes. Raises DataError when it is no readable image, MoqeError for an
        unknown expert.
        """
        picture = _Picture.of(image)
        if expert is not None:
            return self._classification(self._probabilities(expert, picture), expert, None, 1.0, "pinned")
        cascade, ran = self._cascade, set[str]()
        if cascade is not None and cascade.always_first is not None:
            name, reason = self.experts[cascade.always_first], "the cascade always begins with it"
        else:
            decision = self._route(picture, None)
            name, reason = decision.expert, decision.reason
            ran = {self.recipe.experts[0].name} if self._looks_at_an_expert(self.protocol) else set()
        second = None if cascade is None else cascade.second[self.experts.index(name)]
        probabilities, ran = self._probabilities(name, picture), ran | {name}
        if cascade is None or second is None or not bool(cascade.unsure(probabilities)[0]):
            return self._classification(probabilities, name, None, float(len(ran)), reason)
        other = self.experts[second]
        both = (probabilities + self._probabilities(other, picture)) / 2.0
        return self._classification(both, name, other, float(len(ran | {other})), reason)

    def runtime(self, expert: str) -> OnnxRuntime:
        """The runtime of one expert, loaded and verified on first use. Raises MoqeError on an unknown name."""
        if expert not in self._runtimes:
            self._runtimes[expert] = OnnxRuntime(expert_file(self._verified(expert)), torch.get_num_threads())
        return self._runtimes[expert]

    def _route(self, picture: _Picture, protocol: str | None) -> Decision:
        if self.recipe.router.feature == "stem":
            features = self._stem.logits(picture.pixels(self._shared, BASE))
            return self._decide(VectorFeatures(features, self.device), protocol, "its first stage")
        first = self.recipe.experts[0].name
        pixels = picture.pixels(self._shared, first).to(self.device)
        if not self._looks_at_an_expert(protocol or self.protocol):
            return self._decide(VectorFeatures(torch.empty(1, 0), self.device), protocol, "nothing")
        network, last = self._backbone
        features = backbone_features(network.network, last, pixels)
        return self._decide(VectorFeatures(features, self.device), protocol, f"the features of {first}")

    def _looks_at_an_expert(self, protocol: str) -> bool:
        """Whether the deployed router needs a pass of an expert: one that is constant does not."""
        return self.recipe.router.feature == "backbone" and not isinstance(self._router(protocol), Constant)

    def _open_router(self, folder: Path, stored: tuple[Any, bytes] | None = None) -> Router:
        """The saved router, its network, if it has one, in ONNX Runtime."""
        router = load_router(folder, stored)
        inner = innermost(router)
        if not isinstance(inner, NetworkRouter):
            return router
        return with_innermost(router, replace(inner, network=OnnxNetwork(folder / NETWORK)))

    def _probabilities(self, expert: str, picture: _Picture) -> Tensor:
        """Of every class, float32 (1, classes)."""
        return self.runtime(expert).logits(picture.pixels(self._shared, expert)).softmax(1)

    def _classification(
        self, probabilities: Tensor, expert: str, second: str | None, cost: float, reason: str
    ) -> Classification:
        values, order = probabilities[0].sort(descending=True, stable=True)
        shown = [int(i) for i in order[:SHOWN_CLASSES]]
        labels = Counter(self.classes[i] for i in shown)  # ImageNet has two classes called crane, and two maillots
        names = [self.classes[i] if labels[self.classes[i]] == 1 else f"{self.classes[i]} ({i})" for i in shown]
        top = {name: float(p) for name, p in zip(names, values, strict=False)}
        index = int(order[0])
        return Classification(self.classes[index], index, float(values[0]), top, expert, second, cost, reason)

    @cached_property
    def _cascade(self) -> Cascade | None:
        """The deployed cascade; None where the policy is to ask one expert."""
        if self.recipe.router.policy != "cascade" or len(self.experts) < 2:
            return None
        return load_cascade(self.folder.router(self.protocol) / "mixture", len(self.experts))

    @cached_property
    def _stem(self) -> OnnxRuntime:
        return OnnxRuntime(self.folder.shared / STEM, threads=1)  # a second pool would cost more than it gains

    @cached_property
    def _backbone(self) -> tuple[ReferenceImageRuntime, str]:
        """The first expert in the reference runtime, and the name of its last layer."""
        name = self.recipe.experts[0].name
        path = expert_file(self._verified(name))
        folded = ImageModels(self.recipe, self.device).folded(name)
        return ReferenceImageRuntime(folded.network, path), folded.sites[-1].name


@dataclass(frozen=True)
class _Picture:
    """An encoded image and what to call it in errors."""

    content: bytes
    name: str

    @classmethod
    def of(cls, image: Path | str | bytes) -> _Picture:
        if isinstance(image, bytes):
            return cls(image, "the image")
        path = Path(image).expanduser()
        try:
            return cls(path.read_bytes(), str(path))
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error.strerror}): give the path of an image") from error

    def pixels(self, shared: ImageShared, model: str) -> Tensor:
        """As a model takes it: float32, (1, 3, h, w)."""
        preprocessing = shared.preprocessing[model]
        return preprocessing.normalise(preprocessing.arrange(decode(self.content, self.name), self.name)[None])
