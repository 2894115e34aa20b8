"""An expert of integer codes as one GGUF file that llama.cpp, Ollama and LM Studio load, its weights unchanged.

Linears become ggml blocks, see `gguf_codes`; everything else stays as it is stored: matrices in float16, bfloat16 or
float32, vectors in float32, as llama.cpp wants them. Architecture and tokenizer are described as `GgufWriter` does it.
Activations are no part of a GGUF file: llama.cpp rounds the inputs of quantized linears to 8 bits in its own way (by
32 inputs), whatever the expert's scheme says. A full-precision model can be written too, as it is stored.

Every tensor is decoded twice, once to find its block type and once to write it, so that one is in memory at a time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from moqe.errors import CheckpointError
from moqe.formats.expert_files import ExpertFiles
from moqe.formats.ggml_blocks import pack
from moqe.formats.gguf_architecture import architecture_metadata, rope_factors, row_order
from moqe.formats.gguf_codes import Conversion, to_blocks
from moqe.formats.gguf_container import TensorRecord, write_container
from moqe.formats.gguf_names import ROPE_FACTORS, to_gguf
from moqe.formats.gguf_tokenizer import tokenizer_metadata
from moqe.formats.safetensors_folder import SafetensorsFolder
from moqe.models.skeleton import build_skeleton
from moqe.progress import Advance, ignore
from moqe.quantized import BlockTensor, IntegerTensor, Quantized

_FLOATS: dict[torch.dtype, str] = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class Rounding:
    """Of one tensor what was not kept exactly; see `gguf_codes.Conversion`."""

    scales: int
    largest_error: float


@dataclass(frozen=True)
class GgufExport:
    """What is in a written file: how many tensors have which ggml type, and which were rounded (none: lossless)."""

    types: Mapping[str, int]
    rounded: Mapping[str, Rounding]


def write_gguf(
    path: Path, expert: ExpertFiles, base: Path, *, rounding: bool = False, advance: Advance = ignore
) -> GgufExport:
    """Write an expert as the single file `path`.

    base: a folder with the base model's config.json and tokenizer.json, and with a safetensors file of what the expert
    does not replace (a mixture's shared folder, or the base model's own). rounding: allow scales that float16 does not
    hold. `advance` is told twice of each tensor.
    Raises CheckpointError, naming the tensor, where it cannot be kept exactly or is missing; ModelError when GGUF has
    no words for the architecture or the tokenizer; DiskFull.
    """
    config = AutoConfig.from_pretrained(base)
    source = _Source(expert, base, config, rounding)
    order = row_order(config)
    records, origin, rounded = [], {}, {}
    for name in source.names:
        value = source.load(name)
        advance(1)
        if isinstance(value, Conversion):
            shape, kind = tuple(value.tensor.codes.shape), value.tensor.scheme.block
            if value.rounded:
                rounded[name] = Rounding(value.rounded, value.largest_error)
            size = prod(shape) // value.tensor.scheme.block_size * value.tensor.scheme.block_bytes
        else:
            shape, kind, size = tuple(value.shape), _FLOATS[value.dtype], value.numel() * value.itemsize
        records.append(TensorRecord(to_gguf(name), shape, kind, size))
        origin[to_gguf(name)] = name
    factors = rope_factors(config)
    if factors is not None:
        records.append(TensorRecord(ROPE_FACTORS, tuple(factors.shape), "F32", factors.numel() * factors.itemsize))

    def load(record: TensorRecord) -> Tensor:
        if factors is not None and record.name == ROPE_FACTORS:
            return factors.view(torch.uint8)
        value = source.load(origin[record.name])
        advance(1)
        packed = pack(value.tensor) if isinstance(value, Conversion) else value.view(value.shape[0], -1)
        rows = order.gguf_rows(origin[record.name], record.shape[0])
        return (packed if rows is None else packed[rows]).contiguous().view(torch.uint8)

    types = Counter(record.type for record in records)
    matrices = Counter(record.type for record in records if len(record.shape) > 1)
    metadata = architecture_metadata(config, matrices.most_common(1)[0][0]) | tokenizer_metadata(
        base, config.vocab_size
    )
    write_container(path, metadata, records, load)
    return GgufExport(dict(sorted(types.items())), rounded)


class _Source:
    """The tensors of a GGUF file by the base model's names: the expert's, else the base's. Raises CheckpointError."""

    def __init__(self, expert: ExpertFiles, base: Path, config: Any, rounding: bool) -> None:
        self._expert, self._base, self._rounding = expert, SafetensorsFolder(base), rounding
        skeleton = build_skeleton(base, torch.float32)
        first = {id(parameter): name for name, parameter in skeleton.named_parameters()}
        every = dict(skeleton.named_parameters(remove_duplicate=False))
        self._shapes = {name: tuple(parameter.shape) for name, parameter in every.items()}
        self._replaced = set(expert.names())
        # A checkpoint of a model with tied embeddings may have a head of its own all the same.
        apart = {
            name
            for name, parameter in every.items()
            if first[id(parameter)] != name and name in self._replaced and self._differ(name, first[id(parameter)])
        }
        self.names = sorted({*first.values(), *apart})
        lacking = [name for name in self.names if name not in self._replaced and name not in self._base]
        if lacking:
            raise CheckpointError(f"neither the expert nor {base} has {lacking[0]}: build or copy the mixture again")

    def _differ(self, name: str, other: str) -> bool:
        ours, theirs = (
            value if isinstance(value, Tensor) else value.dequantize() for value in map(self._read, (name, other))
        )
        return ours.shape != theirs.shape or not torch.equal(ours.to(torch.float32), theirs.to(torch.float32))

    def _read(self, name: str) -> Quantized | Tensor:
        return self._expert.load(name) if name in self._replaced else self._base.tensor(name)

    def load(self, name: str) -> Conversion | Tensor:
        """A tensor as it will be stored."""
        value = self._read(name)
        shape = tuple(value.shape if isinstance(value, Tensor) else value.codes.shape)
        if shape != self._shapes[name]:
            raise CheckpointError(f"{name} has the shape {shape} and the base model's is {self._shapes[name]}")
        if isinstance(value, IntegerTensor):
            try:
                return to_blocks(value, rounding=self._rounding)
            except ValueError as error:
                remedy = "allow rounding" if "float16 numbers" in str(error) else "leave this expert out"
                raise CheckpointError(f"{name} has no lossless form in GGUF: {error}; {remedy}") from error
        if isinstance(value, BlockTensor):
            return Conversion(value, 0, 0.0)
        stored = value.to(torch.float32) if value.dim() == 1 else value
        if stored.dtype not in _FLOATS:
            raise CheckpointError(f"{name} is of type {stored.dtype}, which is not written to GGUF")
        return stored.contiguous()
