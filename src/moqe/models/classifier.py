"""An image classifier as the rest of MoQE sees it: one network from images to logits, whatever library made it.

    bundled:digits-resnet       what ships with MoQE
    timm:<name>                 timm's pretrained weights, or the state dict given as `weights`
    package.module:factory      called without arguments; `weights`: a state dict (.safetensors), or for a model of
                                torchvision the name of its own, such as IMAGENET1K_V1
    folder, owner/name          transformers, through AutoModelForImageClassification

The preprocessing is the checkpoint's own, so that nobody measures a model on images that it was not made for. What a
recipe states is for models whose checkpoint states none; another one's is kept, and a warning says so.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moqe import recipe
from moqe.data.preprocessing import Preprocessing
from moqe.errors import ModelError, NumericalError, RecipeError
from moqe.models.classifier_origins import Opened, open_origin
from moqe.models.device import check_device
from moqe.models.observation import cannot_run
from moqe.store import canonical_hash, digest_bytes

log = logging.getLogger("moqe")

EXAMPLE_SEED = 20240229


@dataclass(frozen=True)
class Classifier:
    """A full-precision image classifier.

    network: eval mode, float32, no gradients; images, (b, 3, h, w), to logits, (b, classes). labels: the classes'
    names, None where the checkpoint states none. digest: names weights, architecture and preprocessing.
    """

    network: nn.Module
    classes: int
    labels: tuple[str, ...] | None
    preprocessing: Preprocessing
    name: str
    digest: str

    def example(self, images: int = 2) -> Tensor:
        """Random normal images, always the same, (images, 3, h, w), on the network's device."""
        generator = torch.Generator().manual_seed(EXAMPLE_SEED)
        return torch.randn(images, 3, *self.preprocessing.size, generator=generator).to(_device_of(self.network))


class Logits(nn.Module):
    """A model of transformers that returns its logits only."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        """(b, 3, h, w) -> (b, classes)."""
        logits: Tensor = self.model(pixels).logits
        return logits


def open_classifier(
    base: str, weights: str = "", preprocessing: recipe.Preprocessing | None = None, device: str = "cpu"
) -> Classifier:
    """Open a recipe's base model. preprocessing: what the recipe states.

    Raises ModelError when there is no such model or its library is missing, when it is already quantized or its files
    do not fit together, and when it does not return logits; RecipeError when nothing states a preprocessing.
    """
    opened = open_origin(base, weights)
    _check_full_precision(opened.network, base)
    chosen = _preprocessing(base, opened, preprocessing)
    network = Logits(opened.network) if opened.returns_mapping else opened.network
    network = network.float().eval().requires_grad_(False).to(check_device(device))
    classes = _classes(network, chosen, base)
    if opened.labels is not None and len(opened.labels) != classes:
        raise ModelError(f"{base} names {len(opened.labels)} classes and returns {classes} logits: its config is wrong")
    log.info("%s: %d classes; %s", base, classes, chosen.describe())
    return Classifier(network, classes, opened.labels, chosen, base, _digest(network, chosen))


def same_labels(one: Classifier, other: Classifier) -> None:
    """Raise ModelError unless two classifiers answer with the same classes, so that experts of both can be mixed."""
    if one.classes != other.classes:
        raise ModelError(
            f"{one.name} has {one.classes} classes and {other.name} has {other.classes}: experts of one mixture need "
            "the same label set"
        )
    for index, (first, second) in enumerate(zip(one.labels or (), other.labels or (), strict=False)):
        if first.casefold() != second.casefold():
            raise ModelError(
                f"class {index} is {first!r} in {one.name} and {second!r} in {other.name}: experts of one mixture need "
                "the same labels in the same order"
            )


def _preprocessing(base: str, opened: Opened, stated: recipe.Preprocessing | None) -> Preprocessing:
    own = opened.preprocessing
    asked = None if stated is None else Preprocessing.from_recipe(stated)
    if own is None and asked is None:
        raise RecipeError(
            f"{base} does not say how images become its input"
            + (f" ({opened.unreadable})" if opened.unreadable else "")
            + ": state data.preprocessing (resize, crop, mean, std)"
        )
    if own is not None and asked not in (None, own):
        log.warning("%s: its own preprocessing is kept (%s), not the recipe's", base, own.describe())
    chosen = own or asked
    assert chosen is not None
    return chosen


def _check_full_precision(network: nn.Module, base: str) -> None:
    for name, module in network.named_modules():
        kind = type(module)
        if ".quantized" in kind.__module__ and kind.__name__ != "FloatFunctional":  # that one only adds and multiplies
            raise ModelError(
                f"{base} is already quantized ({name} is {kind.__module__}.{kind.__name__}): give the "
                "full-precision model as base"
            )
    for name, parameter in network.named_parameters():
        if not torch.isfinite(parameter).all():
            raise NumericalError(f"{name} of {base} has values that are not finite: repair or replace the base model")


def _classes(network: nn.Module, preprocessing: Preprocessing, base: str) -> int:
    """How many logits there are, by running the network."""
    example = torch.zeros(1, 3, *preprocessing.size, device=_device_of(network))
    try:
        with torch.no_grad():
            logits = network(example)
    except Exception as error:  # the network's code may raise anything
        raise cannot_run(network, example, error) from error
    if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.shape[0] != 1:
        what = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise ModelError(f"{base} returns {what} for one image, not logits of shape (1, classes): it is no classifier")
    if logits.shape[1] < 2:
        raise ModelError(f"{base} returns one logit, and a classifier has at least two classes")
    return int(logits.shape[1])


def _device_of(network: nn.Module) -> torch.device:
    return next((parameter.device for parameter in network.parameters()), torch.device("cpu"))


def _digest(network: nn.Module, preprocessing: Preprocessing) -> str:
    """Of every parameter and buffer, the structure with its settings, and the preprocessing."""
    state = {
        name: [str(tensor.dtype), list(tensor.shape), digest_bytes(tensor.cpu().contiguous().numpy().tobytes())]
        for name, tensor in network.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    return canonical_hash([state, repr(network), preprocessing.digest])
