"""The GGUF container: metadata and tensors as bytes, read lazily and written as a stream.

Specification: ggml's docs/gguf.md, versions 2 and 3, little-endian. Writing the header goes through the `gguf`
package. Reading does not: its reader makes an array object of every element of every metadata array (10 s and 0.5 GB to
open a vocabulary of 150,000 tokens), where walking the header takes half a second.

Only headers are held; a tensor's bytes are read when they are asked for.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType, GGUFWriter
from torch import Tensor

from moqe.errors import CheckpointError
from moqe.store import atomic, require_room

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32
WRITE_BYTES = 1 << 24  # a write call copies at most this much

_OURS = frozenset({"general.architecture", "general.alignment"})  # of a file's metadata, what its writer decides
_TYPES: dict[int, GGMLQuantizationType] = {int(kind): kind for kind in GGMLQuantizationType}
_SCALARS: dict[int, str] = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}


@dataclass(frozen=True)
class Value:
    """A metadata value and the type it is stored as; `element` is the type of an array's elements."""

    value: Any
    type: GGUFValueType
    element: GGUFValueType | None = None


@dataclass(frozen=True)
class TensorRecord:
    """A tensor of a file. `shape` is in PyTorch's order, (out, in); `offset` counts from the file's start."""

    name: str
    shape: tuple[int, ...]
    type: str  # ggml's name: F32, Q4_K, ...
    bytes: int
    offset: int = 0


def string(value: str) -> Value:
    """A metadata string."""
    return Value(value, GGUFValueType.STRING)


def uint32(value: int) -> Value:
    """A metadata integer of the width that llama.cpp's hyperparameters have."""
    return Value(value, GGUFValueType.UINT32)


def float32(value: float) -> Value:
    """A metadata number."""
    return Value(value, GGUFValueType.FLOAT32)


def boolean(value: bool) -> Value:
    """A metadata truth value."""
    return Value(value, GGUFValueType.BOOL)


def array(values: list[Any], element: GGUFValueType) -> Value:
    """A metadata array of one element type."""
    return Value(values, GGUFValueType.ARRAY, element)


class Container:
    """One GGUF file opened for reading: `metadata` and `tensors` at once, bytes on demand.

    Raises CheckpointError when the file is not GGUF, is of an unknown version or byte order, or ends too early.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata: dict[str, Value] = {}
        self.tensors: dict[str, TensorRecord] = {}
        try:
            with path.open("rb") as handle:
                self._data = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError as error:
            raise CheckpointError(f"{path} does not exist") from error
        except ValueError as error:  # an empty file cannot be mapped
            raise CheckpointError(f"{path} is empty: download or build it again") from error
        try:
            self._read_header()
        except (struct.error, IndexError, OverflowError, ZeroDivisionError) as error:
            raise CheckpointError(
                f"{path} is truncated or corrupt in its header: download or build it again"
            ) from error
        for record in self.tensors.values():
            if record.offset + record.bytes > len(self._data):
                raise CheckpointError(
                    f"{path} is truncated: tensor {record.name} ends at byte {record.offset + record.bytes:,} and the "
                    f"file has {len(self._data):,}; download or build it again"
                )

    def text(self, key: str, default: str = "") -> str:
        """A string of the metadata."""
        return str(self.metadata[key].value) if key in self.metadata else default

    def integer(self, key: str, default: int = 0) -> int:
        """An integer of the metadata. Raises CheckpointError when the file has something else there."""
        value = self.metadata[key].value if key in self.metadata else default
        if not isinstance(value, int):
            raise CheckpointError(f"{self.path} has {value!r} as {key}, where MoQE needs one integer")
        return value

    def raw(self, name: str) -> Tensor:
        """A tensor's bytes: uint8, `(rows, row bytes)`, copied out of the file."""
        record = self.tensors[name]
        content = np.frombuffer(self._data, dtype=np.uint8, count=record.bytes, offset=record.offset).copy()
        return torch.from_numpy(content).view(prod(record.shape[:-1]), -1)

    def _read_header(self) -> None:
        if self._data[:4] != MAGIC:
            raise CheckpointError(f"{self.path} is not a GGUF file")
        (version,) = struct.unpack_from("<I", self._data, 4)
        if version not in VERSIONS:
            raise CheckpointError(f"{self.path} has GGUF version {version} (or is big-endian): only 2 and 3 are read")
        tensors, entries = struct.unpack_from("<QQ", self._data, 8)
        position = 24
        for _ in range(entries):
            key, position = self._string(position)
            (kind,) = struct.unpack_from("<I", self._data, position)
            self.metadata[key], position = self._value(kind, position + 4)
        relative = []
        for _ in range(tensors):
            name, position = self._string(position)
            (dimensions,) = struct.unpack_from("<I", self._data, position)
            if dimensions > 4:
                raise CheckpointError(f"{self.path} is corrupt: tensor {name!r} has {dimensions} dimensions")
            shape = struct.unpack_from(f"<{dimensions}Q", self._data, position + 4)
            kind, offset = struct.unpack_from("<IQ", self._data, position + 4 + 8 * dimensions)
            position += 16 + 8 * dimensions
            relative.append((name, tuple(reversed(shape)), kind, offset))
        alignment = self.integer("general.alignment", ALIGNMENT)
        start = -(-position // alignment) * alignment
        for name, sizes, kind, offset in relative:
            if kind not in _TYPES:
                raise CheckpointError(f"{self.path}: tensor {name} has ggml type {kind}, which is unknown: update gguf")
            block, size = GGML_QUANT_SIZES[_TYPES[kind]]
            total = prod(sizes) // block * size
            self.tensors[name] = TensorRecord(name, sizes, _TYPES[kind].name, total, start + offset)

    def _string(self, position: int) -> tuple[str, int]:
        (length,) = struct.unpack_from("<Q", self._data, position)
        end = position + 8 + length
        if end > len(self._data):
            raise IndexError(end)
        # Some vocabularies hold pieces that are no UTF-8; surrogates carry them through unchanged.
        return self._data[position + 8 : end].decode("utf-8", "surrogateescape"), end

    def _value(self, kind: int, position: int) -> tuple[Value, int]:
        if kind == GGUFValueType.STRING:
            text, position = self._string(position)
            return string(text), position
        if kind in _SCALARS:
            (number,) = struct.unpack_from("<" + _SCALARS[kind], self._data, position)
            return Value(number, GGUFValueType(kind)), position + struct.calcsize(_SCALARS[kind])
        if kind != GGUFValueType.ARRAY:
            raise CheckpointError(f"{self.path} is corrupt: metadata type {kind} does not exist")
        element, length = struct.unpack_from("<IQ", self._data, position)
        position += 12
        if element == GGUFValueType.STRING:
            texts = []
            for _ in range(length):
                text, position = self._string(position)
                texts.append(text)
            return array(texts, GGUFValueType.STRING), position
        if element not in _SCALARS:
            raise CheckpointError(f"{self.path} has a metadata array of type {element}, which is not supported")
        form = f"<{length}{_SCALARS[element]}"
        numbers = list(struct.unpack_from(form, self._data, position))
        return array(numbers, GGUFValueType(element)), position + struct.calcsize(form)


def write_container(
    path: Path, metadata: Mapping[str, Value], records: list[TensorRecord], load: Callable[[TensorRecord], Tensor]
) -> None:
    """Write one GGUF file atomically, holding one tensor at a time.

    `load` gives the bytes of each of `records` as uint8 of any shape; the offsets in `records` are not used. `metadata`
    must hold `general.architecture`. Raises DiskFull.
    """
    require_room(path.parent, sum(record.bytes for record in records))
    with atomic(path) as partial:
        writer = GGUFWriter(partial, str(metadata["general.architecture"].value))
        try:
            for key, value in metadata.items():
                if key not in _OURS and value.value != []:  # the gguf package writes no empty arrays
                    writer.add_key_value(key, _encoded(value), value.type, value.element)
            for record in records:
                kind = GGMLQuantizationType[record.type]
                writer.add_tensor_info(record.name, record.shape, np.dtype(np.void), record.bytes, raw_dtype=kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            (handle,) = writer.fout
            for record in records:
                handle.write(bytes(-handle.tell() % ALIGNMENT))
                for chunk in _chunks(load(record), record.bytes):
                    handle.write(chunk)
            handle.write(bytes(-handle.tell() % ALIGNMENT))
        finally:
            writer.close()


def concatenate(path: Path, metadata: Mapping[str, Value], sources: Sequence[Container]) -> None:
    """Write all tensors of several files into one, in order. Raises DiskFull."""
    origin = {name: source for source in sources for name in source.tensors}
    records = [record for source in sources for record in source.tensors.values()]
    write_container(path, metadata, records, lambda record: origin[record.name].raw(record.name))


def _encoded(value: Value) -> Any:
    if value.type == GGUFValueType.STRING:
        return value.value.encode("utf-8", "surrogateescape")
    if value.element == GGUFValueType.STRING:
        return [text.encode("utf-8", "surrogateescape") for text in value.value]
    return value.value


def _chunks(data: Tensor, expected: int) -> Iterator[memoryview]:
    if data.numel() != expected:
        raise ValueError(f"{data.numel()} bytes where {expected} were announced")
    view = data.contiguous().view(-1).numpy().data
    for start in range(0, expected, WRITE_BYTES):
        yield view[start : start + WRITE_BYTES]
