"""Where image classifiers come from: transformers, timm, a factory, or MoQE itself. See `classifier.py`."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moqe.bundled import bundled_classifier
from moqe.data.preprocessing import Preprocessing
from moqe.errors import ModelError, RecipeError, did_you_mean
from moqe.models.checkpoint_preprocessing import of_timm, of_torchvision, of_transformers
from moqe.models.state_dict import load_state
from moqe.models.weights import BUNDLED, read_config, resolve_base

TIMM = "timm:"
_FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_FACTORY_SEED = 0


@dataclass(frozen=True)
class Opened:
    """A network and what its checkpoint says of it.

    preprocessing: None where it says nothing, or, then with a sentence in `unreadable`, nothing that can be followed.
    returns_mapping: logits are a field of what it returns.
    """

    network: nn.Module
    labels: tuple[str, ...] | None = None
    preprocessing: Preprocessing | None = None
    unreadable: str = ""
    returns_mapping: bool = False


def open_origin(base: str, weights: str) -> Opened:
    """Open a base model by the form of its name. Raises ModelError and RecipeError."""
    if base.startswith(TIMM):
        return _timm(base.removeprefix(TIMM), weights)
    if _FACTORY.fullmatch(base) and not base.startswith(BUNDLED):
        return _factory(base, weights)
    if weights:
        raise RecipeError(f"weights has no effect for {base}, which holds its own: remove it")
    return _bundled(base.removeprefix(BUNDLED)) if base.startswith(BUNDLED) else _transformers(base)


def _bundled(name: str) -> Opened:
    found = bundled_classifier(name)
    network = found.factory()
    load_state(network, found.weights)
    return Opened(network, found.labels, Preprocessing.from_recipe(found.preprocessing))


def _transformers(base: str) -> Opened:
    from transformers import AutoModelForImageClassification
    from transformers.utils import logging as messages

    folder = resolve_base(base)
    config = read_config(folder)
    shown = messages.is_progress_bar_enabled()
    messages.disable_progress_bar()  # who shows progress here is not the library
    try:
        model, report = AutoModelForImageClassification.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, ImportError) as error:
        raise ModelError(
            f"{folder} cannot be opened as an image classifier of transformers ({_line(error)}): check model_type in "
            "its config.json and its safetensors files"
        ) from error
    finally:
        if shown:
            messages.enable_progress_bar()
    for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        names = sorted(str(name) for name in report[kind] if not str(name).endswith("num_batches_tracked"))
        if names:  # transformers would fill in random values
            raise ModelError(
                f"{folder} does not fit its config: {kind.replace('_', ' ')} {', '.join(names[:3])} "
                f"({len(names)} in all): it holds another model's weights, or one without a classifier"
            )
    labels = _labels(config)
    try:
        return Opened(model, labels, of_transformers(folder), returns_mapping=True)
    except ModelError as error:  # a recipe may state what such a checkpoint does not
        return Opened(model, labels, None, str(error), returns_mapping=True)


def _labels(config: dict[str, Any]) -> tuple[str, ...] | None:
    """The classes' names; None where the config has none but transformers' own LABEL_0, LABEL_1, ..."""
    stated = config.get("id2label") or {}
    names = tuple(str(stated[key]) for key in sorted(stated, key=int))
    return None if not names or all(re.fullmatch(r"LABEL_\d+", name) for name in names) else names


def _timm(name: str, weights: str) -> Opened:
    try:
        timm: Any = importlib.import_module("timm")
    except ModuleNotFoundError as error:  # timm itself, or the torchvision that it needs
        raise _not_installed(error.name or "timm", f"{TIMM}{name}") from None
    except (ImportError, RuntimeError) as error:  # such as a torchvision built for another torch
        raise ModelError(f"timm cannot be imported ({_line(error)}): install a torchvision that fits torch") from error
    try:
        with _seeded():
            network = timm.create_model(name, pretrained=not weights)
    except (RuntimeError, OSError, ValueError) as error:
        hint = _close(name.split(".")[0], timm.list_models())
        raise ModelError(
            f"timm cannot open {name!r} ({_line(error)}){hint}: check the name and the network, or give a "
            "state dict as weights"
        ) from error
    if weights:
        load_state(network, Path(weights).expanduser())
    try:
        return Opened(network, None, of_timm(timm.data.resolve_model_data_config(network), f"{TIMM}{name}"))
    except ModelError as error:
        return Opened(network, None, None, str(error))


def _factory(base: str, weights: str) -> Opened:
    module, _, name = base.partition(":")
    factory = _imported(module, name, base)
    preset = _torchvision_weights(module, factory, weights)
    try:
        with _seeded():
            network = factory() if preset is None else factory(weights=preset)
    except Exception as error:  # the user's code may raise anything
        raise ModelError(f"{base} failed ({type(error).__name__}: {_line(error)})") from error
    if not isinstance(network, nn.Module):
        raise ModelError(f"{base} returned {type(network).__name__}, not a torch.nn.Module")
    if preset is not None:
        return Opened(network, tuple(preset.meta["categories"]), of_torchvision(preset.transforms()))
    if weights:
        load_state(network, Path(weights).expanduser())
    return Opened(network)


def _imported(module: str, name: str, base: str) -> Any:
    try:
        with _importable_from_here():
            found: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if module.split(".")[0] == "torchvision":
            raise _not_installed("torchvision", base) from None
        raise ModelError(f"base {base}: {error}; install the package, or run from the folder that holds it") from error
    except Exception as error:  # importing runs the user's code
        raise ModelError(f"base {base}: importing {module} failed ({type(error).__name__}: {_line(error)})") from error
    if not callable(getattr(found, name, None)):
        raise ModelError(f"base {base}: {module} has no function {name!r}{_close(name, dir(found))}")
    return getattr(found, name)


def _torchvision_weights(module: str, factory: Any, weights: str) -> Any:
    """The member of a torchvision weights enum that `weights` names; None where it names a file or nothing."""
    if not weights or not module.startswith("torchvision.models") or Path(weights).suffix:
        return None
    models: Any = importlib.import_module("torchvision.models")
    known = models.get_model_weights(factory).__members__
    if weights not in known:
        raise ModelError(f"torchvision has no weights {weights!r} for this model; {did_you_mean(weights, known)}")
    return known[weights]


@contextmanager
def _seeded() -> Iterator[None]:
    """Networks that are made at random are made alike each time, and nobody else's random numbers change."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_FACTORY_SEED)
        yield


@contextmanager
def _importable_from_here() -> Iterator[None]:
    """Let modules of the working folder be imported, as `python -m` does; the command `moqe` does not by itself."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)


def _not_installed(package: str, base: str) -> ModelError:
    """Neither is in an extra: torchvision must fit the build of torch, and timm brings it along."""
    return ModelError(f"base {base} needs {package}, which is not installed: pip install {package}")


def _close(name: str, known: Iterable[str]) -> str:
    """A hint at a similar name, without the list of all: libraries have hundreds."""
    known = set(known)
    hint = did_you_mean(name, known) if known and name not in known else ""
    return f"; {hint}" if hint.startswith("did") else ""


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
