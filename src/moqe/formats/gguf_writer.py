"""Writing an expert as GGUF: block by block while it is made, then as a split file that llama.cpp loads.

Specification: ggml's docs/gguf.md; splits as llama.cpp's gguf-split makes them. The first file holds metadata,
tokenizer and the decoder blocks, the second the tensors around the blocks in the base model's precision. The second is
the same for every GGUF expert of a mixture: it is made once in the shared folder and hard-linked. Split files are for
llama.cpp; `merge_gguf` makes one file for those who take no split ones (Ollama).

A finished block waits in the work folder as a small GGUF file of its own, so a killed build resumes with the next
block; `finish` streams them together, one tensor in memory at a time. Same tensors, same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from math import prod
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig

from moqe.errors import CheckpointError, ModelError
from moqe.formats.ggml_blocks import pack
from moqe.formats.gguf_architecture import architecture_metadata, rope_factors, row_order
from moqe.formats.gguf_container import Container, TensorRecord, Value, boolean, concatenate, write_container
from moqe.formats.gguf_names import ROPE_FACTORS, to_gguf
from moqe.formats.gguf_split import FIRST_FILE, SECOND_FILE, SHARED_KEY, split_metadata
from moqe.formats.gguf_tokenizer import tokenizer_metadata
from moqe.models.weights import CheckpointWeights
from moqe.quantized import BlockTensor, IntegerTensor, Quantized
from moqe.schemes import Scheme
from moqe.store import link

_FLOAT_TYPES: dict[torch.dtype, str] = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


class GgufWriter:
    """An `ExpertWriter` for block schemes.

    `base` is the base model's folder, `shared` the mixture's folder of shared files, `work` where finished blocks
    wait. Raises ModelError at once when the architecture, the position encoding or the tokenizer cannot be written.
    """

    def __init__(
        self, folder: Path, base: Path, shared: Path, scheme: Scheme, number_of_blocks: int, work: Path
    ) -> None:
        self._folder, self._shared, self._work = folder, shared, work
        self._blocks = number_of_blocks
        self._config = AutoConfig.from_pretrained(base)
        self._rows = row_order(self._config)
        described = architecture_metadata(self._config, scheme.block)
        self._metadata = described | tokenizer_metadata(base, self._config.vocab_size)
        self._base = CheckpointWeights(base)

    def has(self, block: int) -> bool:
        """Whether block `block` is already on disk, whole."""
        return self._part(block).exists() or (self._folder / FIRST_FILE).exists()

    def write(self, block: int, tensors: Mapping[str, Quantized | Tensor]) -> None:
        """Pack the parameters of one decoder block and keep them until `finish`.

        Matrices that are not quantized are stored in the base model's precision, vectors in float32. Raises
        ModelError when a parameter of the block is missing or has no name in GGUF, CheckpointError when one holds
        integer codes that are no block type's.
        """
        missing = set(self._block_names(block)) - set(tensors)
        if missing:
            raise ModelError(f"block {block} lacks {', '.join(sorted(missing))}: every parameter must be written")
        stored = [self._stored(name, tensors[name]) for name in sorted(tensors)]
        data = {record.name: content for record, content in stored}
        records = [record for record, _ in stored]
        architecture = {"general.architecture": self._metadata["general.architecture"]}
        write_container(self._part(block), architecture, records, lambda record: data[record.name])

    def finish(self) -> None:
        """Write the two files, then drop the waiting blocks."""
        first = self._folder / FIRST_FILE
        self._write_shared()
        link(self._shared / SECOND_FILE, self._folder / SECOND_FILE)
        if not first.exists():
            parts = [Container(self._part(block)) for block in range(self._blocks)]
            concatenate(first, self._metadata | self._split(0), parts)
        for block in range(self._blocks):
            self._part(block).unlink(missing_ok=True)

    def _part(self, block: int) -> Path:
        return self._work / f"block-{block:05d}.gguf"

    def _stored(self, name: str, value: Quantized | Tensor) -> tuple[TensorRecord, Tensor]:
        if isinstance(value, IntegerTensor):
            raise CheckpointError(f"{name} has scheme {value.scheme.name}: GGUF holds block schemes such as q4_k")
        if isinstance(value, BlockTensor):
            shape, kind, data = value.codes.shape, value.scheme.block, pack(value).cpu()
        else:
            dtype = self._float_type(value.shape)
            shape, kind, data = value.shape, _FLOAT_TYPES[dtype], _rows(value.to("cpu", dtype))
        order = self._rows.gguf_rows(name, shape[0])
        return TensorRecord(to_gguf(name), tuple(shape), kind, data.numel()), data if order is None else data[order]

    @cached_property
    def _outer(self) -> dict[str, tuple[int, ...]]:
        """The base model's tensors around the blocks and their shapes."""
        matrix = (self._config.vocab_size, self._config.hidden_size)
        outer = {"model.embed_tokens.weight": matrix, "model.norm.weight": matrix[1:]}
        return outer if self._config.tie_word_embeddings else outer | {"lm_head.weight": matrix}

    @cached_property
    def _dtype(self) -> torch.dtype:
        """The base model's precision: that of its embeddings."""
        name = "model.embed_tokens.weight"
        return self._base.load(name, self._outer[name]).dtype

    def _block_names(self, block: int) -> list[str]:
        # Old Llama checkpoints store the rotary frequencies too, which are no parameters.
        prefix = f"model.layers.{block}."
        return [name for name in self._base.names() if name.startswith(prefix) and not name.endswith(".inv_freq")]

    def _write_shared(self) -> None:
        path = self._shared / SECOND_FILE
        if path.exists():
            return
        names = {to_gguf(name): name for name in self._outer}
        shapes = {to_gguf(name): shape for name, shape in self._outer.items()}
        factors = rope_factors(self._config)
        if factors is not None:
            shapes[ROPE_FACTORS] = tuple(factors.shape)

        def load(record: TensorRecord) -> Tensor:
            if factors is not None and record.name == ROPE_FACTORS:
                return _rows(factors)
            return _rows(self._base.load(names[record.name], record.shape).to(self._float_type(record.shape)))

        types = {name: self._float_type(shape) for name, shape in shapes.items()}
        records = [
            TensorRecord(name, shape, _FLOAT_TYPES[types[name]], prod(shape) * types[name].itemsize)
            for name, shape in shapes.items()
        ]
        metadata = {"general.architecture": self._metadata["general.architecture"], SHARED_KEY: boolean(True)}
        write_container(path, metadata | self._split(1), records, load)

    def _float_type(self, shape: tuple[int, ...]) -> torch.dtype:
        """What llama.cpp expects of tensors that are not quantized: vectors in float32."""
        return self._dtype if len(shape) > 1 else torch.float32

    def _split(self, number: int) -> dict[str, Value]:
        inside = sum(len(self._block_names(block)) for block in range(self._blocks))
        around = len(self._outer) + (rope_factors(self._config) is not None)
        return split_metadata(number, inside + around)


def _rows(value: Tensor) -> Tensor:
    """A float tensor's bytes: uint8, (out, row bytes)."""
    return value.contiguous().view(value.shape[0], -1).view(torch.uint8)
