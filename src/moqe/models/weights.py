"""The base model's files: where they are, and its parameters read by name, one at a time.

Only safetensors are read, in one file or in shards with an index. Nothing is loaded before it is asked for, and what is
loaded is checked: a shape that differs from the config's, or a value that is not finite, never gets any further.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moqe.bundled import bundled_model
from moqe.errors import ModelError, NumericalError, did_you_mean

BUNDLED = "bundled:"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_HUB_ID = re.compile(r"^[\w.-]+(/[\w.-]+)?$")
_HUB_FILES = ("*.json", "*.safetensors", "*.gguf", "*.txt", "*.model", "*.jinja")


class Weights(Protocol):
    """Parameters by name."""

    def names(self) -> Sequence[str]:
        """Every parameter's name."""

    def load(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The parameter in the type it is stored in, on the CPU."""


class CheckpointWeights:
    """Parameters of a folder with safetensors files.

    Raises ModelError when the folder has none, when one is missing, truncated or corrupt, or when its index does not
    match it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file_of: dict[str, str] = {}
        if (folder / INDEX).exists():
            self._file_of = _read_index(folder / INDEX)
        elif (folder / SINGLE).exists():
            self._file_of = dict.fromkeys(_names_in(folder / SINGLE), SINGLE)
        else:
            raise ModelError(
                f"{folder} has neither {SINGLE} nor {INDEX}: download the safetensors files, or convert the model "
                "with save_pretrained"
            )

    def names(self) -> Sequence[str]:
        """Every parameter's name, sorted."""
        return sorted(self._file_of)

    def load(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The parameter in the type it is stored in, on the CPU.

        Raises ModelError when it is missing, unreadable or has another shape than the config implies, NumericalError
        when it is not finite.
        """
        if name not in self._file_of:
            raise ModelError(f"{self.folder} has no parameter {name!r}; {did_you_mean(name, self._file_of)}")
        path = self.folder / self._file_of[name]
        try:
            with safe_open(path, framework="pt") as handle:
                tensor: Tensor = handle.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{path} cannot be read ({error}): it is missing or damaged, download it again") from error
        if tuple(tensor.shape) != shape:
            raise ModelError(
                f"{name} in {path} has shape {tuple(tensor.shape)}, config.json implies {shape}: the two files belong "
                "to different models"
            )
        if not torch.isfinite(tensor).all():
            raise NumericalError(f"{name} in {path} has values that are not finite: repair or replace the base model")
        return tensor


class ZeroWeights:
    """Zeros for every parameter: enough to learn shapes and groups from a config alone."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self._dtype = dtype

    def names(self) -> Sequence[str]:
        """No names: nothing is stored."""
        return ()

    def load(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Zeros, in the type that the real weights would have."""
        return torch.zeros(shape, dtype=self._dtype)


def resolve_base(base: str, weights: bool = True) -> Path:
    """The local folder of a base model: `bundled:<name>`, a folder, or a hub id (downloaded or taken from the cache).

    Without `weights` only a hub model's config and tokenizer are fetched.

    Raises ModelError when there is no such model, RecipeError for an unknown bundled name.
    """
    if base.startswith(BUNDLED):
        return bundled_model(base.removeprefix(BUNDLED))
    folder = Path(base).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").exists():
            raise ModelError(f"{folder} has no config.json: base must be the folder of a transformers model")
        return folder
    if folder.exists() or not _HUB_ID.match(base):
        raise ModelError(f"base {base!r} is not a folder, a hub id such as Qwen/Qwen3-0.6B, or bundled:<name>")
    return download(base, weights)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a base model.

    Raises ModelError when it is missing, not JSON, or says that the model is already quantized.
    """
    config = _read_mapping(folder / "config.json")
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "an unnamed method")
        raise ModelError(
            f"{folder} is already quantized (quantization_config in config.json: {method}): give the full-precision "
            "model as base; this one can be an expert, with `checkpoint:` in place of `method:`"
        )
    return config


def download(base: str, weights: bool = True) -> Path:
    """The folder of a model of the hub, from its cache where it is there. Raises ModelError when out of reach."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = [name for name in _HUB_FILES if weights or not name.endswith((".safetensors", ".gguf"))]
    try:
        return Path(snapshot_download(base, allow_patterns=wanted))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        raise ModelError(
            f"base {base!r} is no local folder and cannot be fetched from the hub ({type(error).__name__}): check the "
            f"name and the network, or run `hf download {base}` elsewhere and give the folder as base"
        ) from error


def _read_index(path: Path) -> dict[str, str]:
    index: dict[str, str] = _read_mapping(path).get("weight_map", {})
    if not index:
        raise ModelError(f"{path} has no weight_map, so it is not an index of safetensors files: download it again")
    for file in sorted(set(index.values())):
        absent = {name for name, place in index.items() if place == file} - set(_names_in(path.parent / file))
        if absent:
            raise ModelError(f"{path.parent / file} lacks {min(absent)}, which its index promises: download both again")
    return index


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as JSON ({error}): it is missing or damaged") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} is damaged: it holds no mapping")
    return content


def _names_in(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="pt") as handle:
            return list(handle.keys())
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path} cannot be read ({error}): it is missing or damaged, download it again") from error
