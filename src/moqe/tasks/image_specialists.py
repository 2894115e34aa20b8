"""From calibration images to a generalist and specialists: who sees which images how often, in rounds if asked for.

Every member is fitted by the same method with the same number of updates; what differs is how often it sees an image.
A specialist's own images are at first those of its cluster, told apart by what the router sees of them, and after a
round of alternation those on which it follows the base model most closely. Where something is chosen (rounds, or an
`own_weight` that the recipe leaves open) nobody is fitted to a tenth of the images, and these decide.

A family is judged as it will be used: a linear router predicts each member's loss on held-out images that it was not
fitted to (five folds), the member with the lowest prediction answers, and its loss counts; where that is worse than
the generalist alone, the generalist's. A round that does not lower this is not kept.

What is fitted is kept under `.work`, so an interrupted build goes on with the member that it was fitting.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from moqe.data.images import ImageSamples, PreparedImages
from moqe.errors import DataError
from moqe.expert_options import GENERALIST, OWN_WEIGHTS, Specialists
from moqe.folder import MixtureFolder
from moqe.formats.onnx_reader import read_onnx_layers
from moqe.methods.certificate import certify, significant
from moqe.methods.vision import VISION_METHODS, CalibrationImages, Job, VisionResult
from moqe.methods.vision.layer import QuantizedLayer
from moqe.methods.vision.network import quantize_network
from moqe.methods.vision.observe import BATCH
from moqe.methods.vision.rescale import rescale, scale_options
from moqe.methods.vision.training import logits_of
from moqe.methods.vision.weighted import RepeatedImages, weighted_rows
from moqe.models.clusters import clusters
from moqe.progress import Progress, ignore
from moqe.recipe import Expert, Recipe
from moqe.router.examples import RoutingExamples
from moqe.router.features import Features, SelectedFeatures
from moqe.router.linear import fit_linear
from moqe.router.router import choose, realised_losses
from moqe.router.selection import folds_by_document, predict_unseen
from moqe.schemes import Scheme
from moqe.store import link, read_json, write_json
from moqe.tasks.image_expert_files import expert_file, records, write_expert
from moqe.tasks.image_models import FoldedClassifier, ImageModels

HELD_OUT = 0.1  # of the calibration images, where something is chosen
FOLDS = 5
_NOTES = "notes.json"


@dataclass(frozen=True)
class Fitted:
    """One fitted member: its layers as its file holds them, where that is, and what its certificate will say.

    own_weight: how often it saw its own images; 1 for the generalist. images: how many were listed for it.
    """

    layers: tuple[QuantizedLayer, ...]
    notes: Mapping[str, Mapping[str, float]]
    folder: Path
    own_weight: float
    images: int


class ImageSpecialists:
    """Makes the experts that a recipe's `specialists` stands for, in a mixture's folder.

    samples: the calibration images. features: what the router sees of them, asked for once somebody needs it.
    """

    def __init__(
        self,
        recipe: Recipe,
        schemes: Mapping[str, Scheme],
        models: ImageModels,
        folder: MixtureFolder,
        samples: ImageSamples,
        features: Callable[[], Features],
    ) -> None:
        assert recipe.specialists is not None
        self.recipe, self.scheme, self.folder = recipe, schemes[GENERALIST], folder
        self.options: Specialists = recipe.specialists
        self.samples, self.features = samples, features
        self.generalist, *self.specialists = recipe.family
        self.folded: FoldedClassifier = models.folded(GENERALIST)
        self.images = PreparedImages(samples, self.folded.classifier.preprocessing, self.folded.example.device)
        self.train, self.held_out = held_out_rows(len(samples), self.options, recipe.seed)

    def run(self, progress: Progress) -> None:
        """Make every member that is not complete. Raises what methods and formats raise.

        Raises DataError where clusters cannot be found, or too few images are held out to choose anything by.
        """
        unfinished = [e for e in self.recipe.family if not self.folder.certificate(e.name).exists()]
        if not unfinished:
            return
        general = self._fit(self.generalist, torch.zeros(len(self.samples), dtype=torch.bool), 1.0, 0, progress)
        self._place(self.generalist, general)  # now: the router may see images through it
        found = clusters(self.features().pooled(), len(self.specialists), self.recipe.seed, "calibration images")
        label = torch.tensor(found)
        members = [general, *self._round(label, 0, progress)]
        everything = torch.arange(len(self.samples))
        rounds, score = list[dict[str, float]](), self._score(members) if self.options.rounds else 0.0
        for number in range(1, self.options.rounds + 1):
            assigned = torch.stack([self._losses(member, everything) for member in members[1:]], dim=1).argmin(1)
            again = [general, *self._round(assigned, number, progress)]
            now = self._score(again)
            rounds.append({"round": number, "before": significant(score), "after": significant(now)})
            if now >= score:
                break
            members, score, label = again, now, assigned
        for index, (expert, member) in enumerate(zip(self.recipe.family, members, strict=True)):
            if expert in unfinished:
                own = int((label == index - 1).sum()) if index else len(self.samples)
                facts = {"own_images": own, "own_weight": member.own_weight, "rounds": rounds}
                self._finish(expert, member, facts)

    def _round(self, label: Tensor, number: int, progress: Progress) -> list[Fitted]:
        """Fit every specialist on its label's images, with the weight that its held-out images like best."""
        found = []
        for index, expert in enumerate(self.specialists):
            own, tried = label == index, list[tuple[float, Fitted]]()
            for weight in (self.options.own_weight,) if self.options.own_weight else OWN_WEIGHTS:
                member = self._fit(expert, own, weight, number, progress)
                rows = self.held_out[own[self.held_out]]
                undecided = len(rows) > 0 and self.options.own_weight is None
                loss = float(self._losses(member, rows).mean()) if undecided else 0.0
                tried.append((loss, member))
            found.append(min(tried, key=lambda pair: pair[0])[1])  # the first of equals
        return found

    def _fit(self, expert: Expert, own: Tensor, weight: float, number: int, progress: Progress) -> Fitted:
        """Fit one member to images of which those with `own`, bool (n,), stand `weight` times; or read it back."""
        everything = len(self.train) == len(self.samples)
        images: CalibrationImages = self.images if everything else RepeatedImages(self.images, self.train)
        if weight != 1.0:
            rows = weighted_rows(own[self.train], weight, self.recipe.seed)
            images = RepeatedImages(self.images, self.train[rows])
        folder = self.folder.training(expert.name) / f"round-{number}" / f"own-{weight:g}"
        job = self._job(expert, images, progress)
        if self.options.share == "codes":
            codes = self._codes(progress)
            made = self._kept(folder, expert, lambda: rescale(job, codes))
        else:
            made = self._kept(folder, expert, lambda: VISION_METHODS[expert.method].fit(job))
        return Fitted(made.layers, made.notes, folder, weight, len(images))

    def _codes(self, progress: Progress) -> tuple[QuantizedLayer, ...]:
        """The codes that all members share: the method's, on all images alike, with the scales it found."""
        train = RepeatedImages(self.images, self.train)
        job = self._job(self.generalist, train, progress)
        folder = self.folder.training(GENERALIST) / "codes"
        return self._kept(folder, self.generalist, lambda: VISION_METHODS[self.options.method].fit(job)).layers

    def _job(self, expert: Expert, images: CalibrationImages, progress: Progress) -> Job:
        folded = self.folded
        return Job(folded.network, folded.sites, folded.blocks, images, self.scheme, expert, self.recipe.seed, progress)

    def _kept(self, folder: Path, expert: Expert, make: Callable[[], VisionResult]) -> VisionResult:
        """What is in a folder, or else what `make` makes, written there and read back: notes last."""
        if not (folder / _NOTES).exists():
            result = make()
            write_expert(expert_file(folder), self.folded, result, expert)
            write_json(folder / _NOTES, {name: dict(note) for name, note in result.notes.items()})
        return VisionResult(read_onnx_layers(expert_file(folder)), read_json(folder / _NOTES))

    def _losses(self, member: Fitted, rows: Tensor) -> Tensor:
        """A member's loss on the calibration images at `rows`, int64 (m,): float32, (m,).

        KL(base || member) in nats; cross-entropy with the labels where the method learns from them.
        """
        images = RepeatedImages(self.images, rows)
        logits = logits_of(quantize_network(self.folded.network, member.layers), images)
        if self.options.method == "qat" and self.generalist.qat.loss == "labels":
            return cross_entropy(logits, images.labels, reduction="none").cpu()
        truth = self._truth[rows.to(logits.device)]
        return kl_div(logits.log_softmax(-1), truth, reduction="none", log_target=True).sum(-1).cpu()

    @cached_property
    def _truth(self) -> Tensor:
        """The base's log-probabilities of every calibration image, (n, classes)."""
        return logits_of(self.folded.network, self.images).log_softmax(-1)

    def _score(self, members: Sequence[Fitted]) -> float:
        """The family's mean loss on held-out images: see the head of this file."""
        losses = torch.stack([self._losses(member, self.held_out) for member in members], dim=1)
        document = tuple(self.samples.document[row] for row in self.held_out.tolist())
        return routed_loss(SelectedFeatures(self.features(), self.held_out), losses, document, self.recipe.seed)

    def _place(self, expert: Expert, member: Fitted) -> None:
        """Put a member's file where experts are."""
        link(expert_file(member.folder), expert_file(self.folder.expert(expert.name)))

    def _finish(self, expert: Expert, member: Fitted, facts: Mapping[str, Any]) -> None:
        """Put a member where experts are, its certificate last."""
        self._place(expert, member)
        made = VisionResult(member.layers, member.notes)
        found = certify(expert, records(expert, self.scheme, self.folded.sites, made, member.images), calibrated=True)
        certificate = replace(found, codes_of=expert.codes_of, specialised=dict(facts))
        write_json(self.folder.certificate(expert.name), certificate.to_json())


def held_out_rows(count: int, options: Specialists, seed: int) -> tuple[Tensor, Tensor]:
    """Of `count` images the rows to fit to and those to choose by; nothing is held out where nothing is chosen.

    Raises DataError where too few images are left to choose by.
    """
    if not options.rounds and options.own_weight is not None:
        return torch.arange(count), torch.empty(0, dtype=torch.int64)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    size = round(HELD_OUT * count)
    if size < 2 * FOLDS:
        raise DataError(
            f"{size} of {count} calibration images would choose between specialists, and {2 * FOLDS} are needed: raise "
            f"data.calibration_samples to {round(2 * FOLDS / HELD_OUT)} or more, or set specialists.own_weight and "
            "leave rounds out"
        )
    return order[size:].sort().values, order[:size].sort().values


def routed_loss(features: Features, losses: Tensor, document: tuple[str, ...], seed: int) -> float:
    """The mean loss of who a cross-validated linear router chooses, or the first expert's if that is lower.

    features: of n samples. losses: (n, experts). document: n names.
    """
    examples = RoutingExamples(features, losses, document)
    fold = folds_by_document(document, FOLDS, seed)
    costs = predict_unseen(fit_linear, examples, fold, ignore)
    routed = realised_losses(losses, choose(costs)).double().mean()
    return float(torch.minimum(routed, losses[:, 0].double().mean()))


def family_passes(recipe: Recipe, images: int) -> dict[str, float]:
    """About how many forward passes of one image each member of the family takes, a step of training counted as three.

    images: of calibration. The generalist's count holds the shared codes'.
    """
    options = recipe.specialists
    if options is None:
        return {}
    found, rounds = {}, 1 + options.rounds
    weights = (options.own_weight,) if options.own_weight else OWN_WEIGHTS
    for expert in recipe.family:
        general = expert.name == GENERALIST
        listed = [1.0] if general else [1.0 + (weight - 1.0) / (len(recipe.family) - 1) for weight in weights]
        once = 0.0
        for share in listed:
            seen = round(share * images)
            once += VISION_METHODS[expert.method].forward_passes(expert, seen)
            if options.share == "codes":
                scales = scale_options(expert)
                trained = 3.0 * scales.steps * scales.batch_size + BATCH
                once += trained if general else trained - VISION_METHODS[expert.method].forward_passes(expert, 0)
        found[expert.name] = once if general else rounds * once
    return found
