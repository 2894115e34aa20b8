"""A folder of safetensors files, one or many with an index: tensors by name, read when asked for.

Format: 8 bytes, the length of a JSON header; the header, which gives every tensor's type, shape and byte range; the
bytes. Tensors are views of the mapped file, so several readers of one file share its pages.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moqe.errors import CheckpointError
from moqe.store import atomic, read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_REMEDY = "delete it and build or download it again"
_IN_BLOCK = re.compile(r"\.\d+\.")


def in_block(name: str) -> bool:
    """Whether a parameter belongs to a decoder block: blocks are numbered, what surrounds them is not."""
    return _IN_BLOCK.search(name) is not None


def read_header(path: Path) -> dict[str, dict[str, Any]]:
    """The entries of a safetensors file by tensor name: `dtype`, `shape`, `data_offsets`.

    Raises CheckpointError when the file is missing, truncated or has no such header.
    """
    try:
        with path.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            size = path.stat().st_size
            if length > size:
                raise CheckpointError(f"{path} is truncated or no safetensors file: {_REMEDY}")
            header: dict[str, dict[str, Any]] = json.loads(handle.read(length))
            header.pop("__metadata__", None)
            end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist: {_REMEDY}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is corrupt ({error}): {_REMEDY}") from error
    if size != 8 + length + end:
        raise CheckpointError(f"{path} is truncated ({size} bytes, {8 + length + end} expected): {_REMEDY}")
    return header


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file atomically, as transformers wants it. Equal tensors give equal bytes."""
    # Tensors that share memory are refused by the format's library, so everything is copied to its own.
    owned = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with atomic(path) as partial:
        save_file(owned, partial, metadata={"format": "pt"})


def read_tensor(path: Path, name: str) -> Tensor:
    """Read one tensor of one file. Raises CheckpointError when it is absent or the file is damaged."""
    return MappedFile(path).tensor(name)


class MappedFile:
    """A safetensors file, mapped. Raises CheckpointError when it is missing or damaged.

    Its tensors are views of the mapping, nothing is copied. It ends when the last of them and this object are gone.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._handle: Any = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} cannot be read ({error}): {_REMEDY}") from error

    def tensor(self, name: str) -> Tensor:
        """One tensor. Raises CheckpointError when it is absent or the file is damaged."""
        try:
            tensor: Tensor = self._handle.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.path} cannot be read ({error}): {_REMEDY}") from error
        return tensor


class SafetensorsFolder:
    """Tensors by name from `model.safetensors`, from indexed shards, or from the only safetensors file of a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._path: dict[str, Path] = {}
        self._headers: dict[Path, dict[str, dict[str, Any]]] = {}
        self._mapped: dict[Path, MappedFile] = {}
        if (folder / INDEX).is_file():
            try:
                weight_map = dict(read_json(folder / INDEX)["weight_map"])
            except (KeyError, TypeError, ValueError) as error:
                raise CheckpointError(f"{folder / INDEX} has no weight_map: {_REMEDY}") from error
            paths = {shard: folder / shard for shard in sorted(set(weight_map.values()))}
            self._headers = {path: read_header(path) for path in paths.values()}
            self._path = {name: paths[shard] for name, shard in sorted(weight_map.items())}
            for name, path in self._path.items():
                if name not in self._headers[path]:
                    raise CheckpointError(f"{path} lacks {name}, which {INDEX} places there: {_REMEDY}")
            return
        path = self._only_file()
        self._headers = {path: read_header(path)}
        self._path = dict.fromkeys(sorted(self._headers[path]), path)

    def _only_file(self) -> Path:
        if (self.folder / SINGLE).is_file():
            return self.folder / SINGLE
        files = sorted(self.folder.glob("*.safetensors")) if self.folder.is_dir() else []
        if len(files) == 1:
            return files[0]
        if files:
            raise CheckpointError(f"{self.folder} has several safetensors files and no {INDEX}: {_REMEDY}")
        raise CheckpointError(
            f"{self.folder} holds no safetensors file (pickled .bin files are not read): "
            "check the path, or save the model again with save_pretrained"
        )

    def __contains__(self, name: str) -> bool:
        return name in self._path

    def names(self) -> list[str]:
        """All tensor names, sorted."""
        return list(self._path)

    def path(self, name: str) -> Path:
        """The file that holds a tensor. Raises CheckpointError when no file does."""
        if name not in self._path:
            raise CheckpointError(f"{self.folder} lacks the tensor {name}: it is incomplete or of another model")
        return self._path[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, without reading it."""
        return tuple(self._headers[self.path(name)][name]["shape"])

    def size(self, name: str) -> int:
        """Bytes a tensor takes in its file, without reading it."""
        begin, end = self._headers[self.path(name)][name]["data_offsets"]
        return int(end - begin)

    def is_float(self, name: str) -> bool:
        """Whether a tensor holds floating-point numbers, without reading it."""
        return str(self._headers[self.path(name)][name]["dtype"]).startswith(("F", "BF"))

    def tensor(self, name: str) -> Tensor:
        """Read one tensor. Raises CheckpointError when it is absent or its file is damaged."""
        path = self.path(name)
        if path not in self._mapped:
            self._mapped[path] = MappedFile(path)
        return self._mapped[path].tensor(name)
