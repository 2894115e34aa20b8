"""Split GGUF files: which belong together, what each says of the others, and one file out of many.

Specification: llama.cpp's gguf-split: `<name>-00001-of-00002.gguf`, with `split.no` counting from 0. llama.cpp loads
split files; Ollama does not.
"""

from __future__ import annotations

import re
from pathlib import Path

from gguf import GGUFValueType

from moqe.errors import CheckpointError
from moqe.formats.gguf_container import Container, Value, concatenate

FIRST_FILE = "model-00001-of-00002.gguf"
SECOND_FILE = "model-00002-of-00002.gguf"
SHARED_KEY = "moqe.shared"  # true in our second files: their tensors are the base model's own

_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


def split_metadata(number: int, tensors: int) -> dict[str, Value]:
    """Metadata of file `number` (from 0) of two that hold `tensors` tensors together, in llama.cpp's types."""
    return {
        "split.no": Value(number, GGUFValueType.UINT16),
        "split.count": Value(2, GGUFValueType.UINT16),
        "split.tensors.count": Value(tensors, GGUFValueType.INT32),
    }


def gguf_paths(path: Path) -> list[Path]:
    """The file, or all files of a split one in order, given any of them or the folder they are in.

    Raises CheckpointError when there is none, when files are missing, or when a folder holds several models.
    """
    if path.is_dir():
        models = sorted({tuple(_siblings(file)) for file in path.glob("*.gguf")})
        if len(models) != 1:
            raise CheckpointError(f"{path} holds {len(models)} GGUF models: name the file of the one that is meant")
        paths = list(models[0])
    else:
        paths = _siblings(path)
    missing = [file.name for file in paths if not file.exists()]
    if missing:
        raise CheckpointError(f"{paths[0].parent} lacks {', '.join(missing)}: download or build it again")
    return paths


def merge_gguf(source: Path, target: Path) -> None:
    """Write the split files at `source` (a folder or one of the files) as the single file `target`.

    Raises CheckpointError when files are missing or damaged, DiskFull when there is no room.
    """
    sources = [Container(file) for file in gguf_paths(source)]
    metadata = {key: value for key, value in sources[0].metadata.items() if not key.startswith("split.")}
    concatenate(target, metadata, sources)


def _siblings(path: Path) -> list[Path]:
    match = _NAME.fullmatch(path.name)
    if match is None:
        return [path]
    count = int(match[3])
    return [path.with_name(f"{match[1]}-{number:05d}-of-{count:05d}.gguf") for number in range(1, count + 1)]
