"""The full-precision models behind a recipe's image experts: opened once, folded once, with one set of labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from moqe.errors import ModelError
from moqe.models.classifier import Classifier, open_classifier, same_labels
from moqe.models.convolutions import LayerSite, blocks, fold_batch_norms, observe_layers
from moqe.recipe import Recipe

EXAMPLE_IMAGES = 4


@dataclass(frozen=True)
class FoldedClassifier:
    """A classifier whose batch norms are folded into its convolutions: what vision methods work on.

    network: float32, eval mode. sites: its convolutions and linears in the order they run. blocks: names of the modules
    that are reconstructed together. moved: the largest change of a logit by folding.
    """

    classifier: Classifier
    network: nn.Module
    sites: tuple[LayerSite, ...]
    blocks: tuple[str, ...]
    example: Tensor
    moved: float

    @property
    def weights(self) -> int:
        """Weights in all convolutions and linears: what is quantized."""
        return sum(int(torch.Size(site.weight_shape).numel()) for site in self.sites)

    @property
    def parameters(self) -> int:
        """All parameters of the folded network."""
        return sum(parameter.numel() for parameter in self.network.parameters())


class ImageModels:
    """The base model of a recipe and those of experts that name their own. Opened when first asked for."""

    def __init__(self, recipe: Recipe, device: str = "cpu") -> None:
        self._recipe, self._device = recipe, device
        self._origin = {expert.name: (expert.base, expert.weights) for expert in recipe.experts if expert.base}
        self._classifiers: dict[tuple[str, str], Classifier] = {}
        self._folded: dict[tuple[str, str], FoldedClassifier] = {}

    @cached_property
    def base(self) -> Classifier:
        """The recipe's base model."""
        return open_classifier(
            self._recipe.base, self._recipe.weights, self._recipe.data.preprocessing, device=self._device
        )

    def of(self, expert: str) -> Classifier:
        """The full-precision model of an expert, or the recipe's for `base`.

        Raises ModelError when its labels are not those of the recipe's base.
        """
        origin = self._origin.get(expert)
        if origin is None:
            return self.base
        if origin not in self._classifiers:
            opened = open_classifier(*origin, self._recipe.data.preprocessing, device=self._device)
            same_labels(self.base, opened)
            self._classifiers[origin] = opened
        return self._classifiers[origin]

    def folded(self, expert: str) -> FoldedClassifier:
        """The folded network of an expert's full-precision model. Raises what folding and observing raise."""
        key = self._origin.get(expert, ("", ""))
        if key not in self._folded:
            self._folded[key] = fold(self.of(expert), self._device)
        return self._folded[key]

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes; their numbers where the base model has no names."""
        return self.base.labels or tuple(str(index) for index in range(self.base.classes))

    def digests(self) -> Mapping[str, str]:
        """What names every full-precision model: `base`, and `base.<expert>` for an expert of another."""
        return {"base": self.base.digest, **{f"base.{name}": self.of(name).digest for name in self._origin}}


def fold(classifier: Classifier, device: str = "cpu") -> FoldedClassifier:
    """Fold a classifier's batch norms and list what can be quantized.

    Raises ModelError when there is no convolution or linear, or when folding moves a logit by more than 1e-4.
    """
    random = torch.Generator().manual_seed(0)
    example = torch.randn(EXAMPLE_IMAGES, 3, *classifier.preprocessing.size, generator=random).to(device)
    found = fold_batch_norms(classifier.network, example)
    sites = tuple(observe_layers(found.network, example))
    if not sites:
        raise ModelError(f"{classifier.name} runs no convolution and no linear layer: there is nothing to quantize")
    return FoldedClassifier(
        classifier, found.network, sites, tuple(blocks(found.network, example)), example, found.max_difference
    )
