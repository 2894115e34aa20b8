"""Compressed-tensors folders read back, ours and llm-compressor's.

Format: see `compressed_tensors`. Also read: one scale per tensor, activation order (`g_idx`), and the words of older
releases of compressed-tensors, in which no value straddles two words.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from moqe.errors import CheckpointError
from moqe.formats.bit_packing import packed_words, unpack
from moqe.formats.compressed_tensors_config import read_config
from moqe.formats.grouped_codes import grouped
from moqe.formats.packed_tensor import PackedTensor
from moqe.formats.safetensors_folder import SafetensorsFolder, in_block
from moqe.formats.shared_codes import Lease
from moqe.quantized import IntegerTensor, Quantized
from moqe.schemes import Scheme
from moqe.store import read_json

_FIELDS = (".weight_packed", ".weight_scale", ".weight_shape", ".weight_zero_point", ".weight_g_idx")
Kind = Literal["codes", "zero points", "scales", "floats"]


@dataclass(frozen=True)
class StoredPart:
    """A tensor of a folder. bytes: what it takes in its file. values: numbers in it, of packed ones those unpacked."""

    kind: Kind
    name: str
    path: Path
    bytes: int
    values: int


class CompressedTensorsFiles:
    """A compressed-tensors folder opened for reading, ours or llm-compressor's. Satisfies `ExpertFiles`.

    Raises CheckpointError when files are missing or damaged, or stored in a way MoQE does not run exactly.
    """

    format = "compressed-tensors"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        config = read_json(folder / "config.json")
        self._formats = read_config(config.get("quantization_config") or {}, str(folder / "config.json"))
        self._opened: SafetensorsFolder | None = SafetensorsFolder(folder)

    @property
    def _files(self) -> SafetensorsFolder:
        if self._opened is None:
            self._opened = SafetensorsFolder(self.folder)
        return self._opened

    def names(self) -> list[str]:
        """Names of the parameters this folder holds, quantized or not."""
        packed = {
            name.removesuffix("_packed") if name.endswith(".weight_packed") else name
            for name in self._files.names()
            if name.endswith(".weight_packed") or not name.endswith(_FIELDS)
        }
        return sorted(packed)

    def activation_bits(self, name: str) -> int:
        """Bits of the dynamic per-token quantization of the input of a linear's weight `name`; 16 means none."""
        linear = name.removesuffix(".weight")
        scheme = self._formats.scheme_of(linear)
        return 16 if scheme is None or f"{linear}.weight_scale" not in self._files else scheme.activation_bits

    def load(self, name: str) -> Quantized | Tensor:
        """One parameter: quantized, or a float tensor. Raises CheckpointError when it is damaged or inconsistent."""
        scheme = self._scheme(name)
        if scheme is None:
            return self._files.tensor(name)
        with self._sound(name):
            return self._decode(name.removesuffix(".weight"), scheme)

    def packed(self, name: str, lease: Lease) -> PackedTensor | Quantized | Tensor:
        """Like `load`, but codes stay as they are stored, in files that `lease` holds in common with other experts.

        Weights with one scale in all, with scattered groups (`g_idx`) or in the words of older releases come as `load`
        gives them.
        """
        linear, scheme = name.removesuffix(".weight"), self._scheme(name)
        if scheme is None or f"{linear}.weight_g_idx" in self._files:
            return self.load(name)

        def field(suffix: str) -> Tensor:
            return lease.tensor(self._files.path(linear + suffix), linear + suffix)

        with self._sound(name):
            if f"{linear}.weight_packed" in self._files:
                rows, columns = (int(size) for size in self._files.tensor(f"{linear}.weight_shape"))
                codes, width = field(".weight_packed"), packed_words(columns, scheme.weight_bits)
            else:
                codes = field(".weight")
                rows, columns = codes.shape
                width = columns
            scale = field(".weight_scale")
            if tuple(codes.shape) != (rows, width) or tuple(scale.shape[:1]) != (rows,):
                return self.load(name)
            zero = None if scheme.symmetric else field(".weight_zero_point")
            return PackedTensor(codes, scale, zero, (rows, columns), scheme)

    def code_files(self) -> set[Path]:
        """The files that hold integer codes."""
        return {part.path for part in self.parts() if part.kind == "codes"}

    def parts(self) -> list[StoredPart]:
        """The tensors of the decoder blocks and what they are, without reading the large ones."""
        parts: list[StoredPart] = []
        for name in filter(in_block, self._files.names()):
            if name.endswith((".weight_shape", ".weight_g_idx")):
                continue
            values = math.prod(self._files.shape(name))
            kind: Kind = "floats"
            if name.endswith((".weight_scale", ".weight_zero_point")):
                kind = "scales" if name.endswith("_scale") else "zero points"
            elif name.endswith(".weight_packed"):
                kind, values = "codes", math.prod(self._files.tensor(name.replace("_packed", "_shape")).tolist())
            elif f"{name}_scale" in self._files:
                kind = "codes"
            parts.append(StoredPart(kind, name, self._files.path(name), self._files.size(name), values))
        return parts

    def close(self) -> None:
        """Forget headers and mappings, which take memory while nobody reads; they are read again when needed."""
        self._opened = None

    def _scheme(self, name: str) -> Scheme | None:
        """The scheme of a quantized weight, None for what is stored as floats. Raises CheckpointError."""
        linear = name.removesuffix(".weight")
        is_weight = linear != name
        scheme = self._formats.scheme_of(linear) if is_weight else None
        if not is_weight or f"{linear}.weight_scale" not in self._files:
            if not self._files.is_float(name):
                raise CheckpointError(f"{self._files.path(name)}: {name} holds integers and has no scale")
            if scheme is not None and in_block(name) and len(self._files.shape(name)) == 2:
                raise CheckpointError(
                    f"{self._files.path(name)}: {name} is in full precision though config.json says it is quantized: "
                    "list it under ignore, or save the model compressed"
                )
            return None
        if scheme is None:
            raise CheckpointError(f"{self.folder}: {linear} is quantized, but no config group covers it")
        return scheme

    @contextmanager
    def _sound(self, name: str) -> Iterator[None]:
        """Raise CheckpointError where the block finds that the stored parts of a weight do not belong together."""
        try:
            yield
        except (ValueError, RuntimeError) as error:
            where = self._files.path(f"{name.removesuffix('.weight')}.weight_scale")
            raise CheckpointError(f"{where}: {name} is damaged ({error}): build or download it again") from error

    def _decode(self, linear: str, scheme: Scheme) -> IntegerTensor | Tensor:
        bits, half = scheme.weight_bits, 1 << (scheme.weight_bits - 1)
        scale = self._files.tensor(f"{linear}.weight_scale")
        zero_key, order_key = f"{linear}.weight_zero_point", f"{linear}.weight_g_idx"
        zero = self._files.tensor(zero_key) if not scheme.symmetric else None
        if f"{linear}.weight_packed" in self._files:
            rows, columns = (int(size) for size in self._files.tensor(f"{linear}.weight_shape"))
            codes = _unpack(self._files.tensor(f"{linear}.weight_packed"), bits, rows, columns)
        else:
            stored = self._files.tensor(f"{linear}.weight")
            if stored.dtype != torch.int8:
                raise ValueError(f"codes of type {stored.dtype} instead of int8")
            codes = (stored.to(torch.int16) + half).to(torch.uint8)
            rows, columns = codes.shape
        scale = scale.reshape(-1, 1).expand(rows, 1).contiguous() if scale.numel() == 1 else scale
        if zero is not None and zero.dtype == torch.int32:
            zero = _unpack(zero.T, bits, scale.shape[1], rows).T.contiguous()
        elif zero is not None:
            zero = (zero.to(torch.int16) + half).to(torch.uint8).reshape(-1, 1 if zero.numel() == 1 else scale.shape[1])
            zero = zero.expand_as(scale).contiguous()
        order = self._files.tensor(order_key) if order_key in self._files else None
        return grouped(codes, scale, zero, bits, scheme.activation_bits, order)


def _unpack(words: Tensor, bits: int, rows: int, columns: int) -> Tensor:
    """Unpack `words`, (rows, words), to (rows, columns).

    Older releases of compressed-tensors let no value straddle two words: 32 // bits to a word. The width tells.
    """
    width = tuple(words.shape)
    if width == (rows, packed_words(columns, bits)):
        return unpack(words, bits, columns)
    per_word = 32 // bits
    if width == (rows, -(-columns // per_word)):
        shifts = torch.arange(per_word, device=words.device) * bits
        values = (words.to(torch.int64)[..., None] >> shifts) & ((1 << bits) - 1)
        return values.view(rows, -1)[:, :columns].to(torch.uint8)
    raise ValueError(f"packed shape {width} does not hold {rows} x {columns} codes of {bits} bits")
