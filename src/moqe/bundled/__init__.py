"""What ships with MoQE so that it runs with no network: a tiny language model, a tiny image classifier, digits.

`tiny-qwen3` has Qwen3's architecture, 3.4 M parameters and its own tokenizer; the folder is loadable by plain
`from_pretrained`. `digits-resnet` is a residual network of 78 thousand parameters for scikit-learn's handwritten
digits. docs/bundled-model.md says how both were trained and how good they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from moqe.bundled.digits import LABELS, SIDE
from moqe.bundled.digits_resnet import DigitsResNet
from moqe.errors import ModelError, RecipeError, did_you_mean
from moqe.recipe import Preprocessing, Recipe, load_recipe
from moqe.store import digest_file, read_json

MODELS = ("tiny-qwen3",)
CLASSIFIERS: dict[str, Callable[[], nn.Module]] = {"digits-resnet": DigitsResNet}
QUICKSTARTS = {"language": "quickstart.yaml", "image-classification": "quickstart-images.yaml"}


@dataclass(frozen=True)
class BundledClassifier:
    """An image classifier that ships: `factory()` makes the network, `weights` is its state dict (.safetensors)."""

    factory: Callable[[], nn.Module]
    weights: Path
    labels: tuple[str, ...]
    preprocessing: Preprocessing


def bundled_model(name: str) -> Path:
    """The folder of a bundled language model.

    Raises RecipeError when there is none of that name, ModelError when a file of it is not the one that was shipped.
    """
    if name in CLASSIFIERS:
        raise RecipeError(f"{name!r} classifies images: set task: image-classification")
    if name not in MODELS:
        raise RecipeError(f"unknown bundled model {name!r}; {did_you_mean(name, MODELS)}")
    return _checked(name)


def bundled_classifier(name: str) -> BundledClassifier:
    """A bundled image classifier: (b, 3, 8, 8) -> logits (b, 10). Raises as `bundled_model` does."""
    if name in MODELS:
        raise RecipeError(f"{name!r} is a language model: set task: language")
    if name not in CLASSIFIERS:
        raise RecipeError(f"unknown bundled image classifier {name!r}; {did_you_mean(name, CLASSIFIERS)}")
    as_they_are = Preprocessing(crop=SIDE, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    return BundledClassifier(CLASSIFIERS[name], _checked(name) / "model.safetensors", LABELS, as_they_are)


def quickstart_recipe(task: str = "language") -> Recipe:
    """The recipe of `moqe quickstart`: 4-bit experts of the bundled model of a task.

    Raises RecipeError on an unknown task.
    """
    if task not in QUICKSTARTS:
        raise RecipeError(f"unknown task {task!r}; {did_you_mean(task, QUICKSTARTS)}")
    return load_recipe(Path(__file__).parent / QUICKSTARTS[task])


def _checked(name: str) -> Path:
    """The folder of a bundled network, after comparing its files with the digests that were shipped."""
    folder = Path(__file__).parent / name
    for file, digest in read_json(folder / "digests.json").items():
        if not (folder / file).is_file() or digest_file(folder / file) != digest:
            raise ModelError(f"{folder / file} is missing or damaged: install moqe again")
    return folder
