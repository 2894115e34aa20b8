"""Reading GGUF experts, ours and anybody's, by the base model's parameter names.

Specification: ggml's docs/gguf.md. Single and split files, float types, every block type of `moqe.schemes`, and any
other type that the `gguf` package can dequantize (as float weights). Query and key rows of the `llama` architecture
come back in Hugging Face's order. Files are mapped; nothing is read before it is asked for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor

from moqe.errors import CheckpointError
from moqe.formats.ggml_blocks import BLOCK_SCHEMES, unpack
from moqe.formats.gguf_architecture import ARCHITECTURES, INTERLEAVED
from moqe.formats.gguf_container import Container, TensorRecord
from moqe.formats.gguf_names import ROPE_FACTORS, RowOrder, from_gguf
from moqe.formats.gguf_split import SHARED_KEY, gguf_paths
from moqe.formats.gguf_tokenizer import Vocabulary, gguf_vocabulary
from moqe.quantized import Quantized

_FLOATS: dict[str, torch.dtype] = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
}


class GgufFiles:
    """An `ExpertFiles` over one GGUF file, all files of a split one, or the folder that holds them.

    Raises CheckpointError when a file is missing, truncated, of an architecture MoQE does not know, or holds tensors
    with no counterpart in the base model.
    """

    format = "gguf"

    def __init__(self, path: Path) -> None:
        self.path = path
        self._containers = [Container(file) for file in gguf_paths(path)]
        first = self._containers[0]
        self.architecture = first.text("general.architecture")
        if self.architecture not in ARCHITECTURES.values():
            known = ", ".join(sorted(set(ARCHITECTURES.values())))
            raise CheckpointError(
                f"{first.path} has the architecture {self.architecture or '(none)'}: MoQE reads {known}"
            )
        heads = first.integer(f"{self.architecture}.attention.head_count")
        key_value_heads = first.integer(f"{self.architecture}.attention.head_count_kv", heads)
        self._rows = RowOrder(self.architecture in INTERLEAVED, heads, key_value_heads)
        self._origin: dict[str, tuple[Container, TensorRecord]] = {}
        self._shared: set[str] = set()
        for container in self._containers:
            for record in container.tensors.values():
                self._add(container, record)
        announced = first.integer("split.tensors.count", sum(len(c.tensors) for c in self._containers))
        if announced != sum(len(c.tensors) for c in self._containers):
            raise CheckpointError(f"{path}: the split files hold other tensors than {first.path.name} announces")

    def names(self) -> list[str]:
        """Parameters that this expert replaces; those of our shared second file are the base's own and not listed."""
        return [name for name in self._origin if name not in self._shared]

    def holds(self, name: str) -> bool:
        """Whether the files hold a parameter, the base's own in our second file included."""
        return name in self._origin

    def load(self, name: str) -> Quantized | Tensor:
        """One parameter: a BlockTensor, or a float tensor in the type it is stored in.

        Raises CheckpointError when the file has no such parameter or cannot be decoded.
        """
        if name not in self._origin:
            raise CheckpointError(f"{self.path} has no parameter {name}")
        container, record = self._origin[name]
        raw = container.raw(record.name)
        order = self._rows.hugging_face_rows(name, record.shape[0])
        if order is not None:
            raw = raw.view(record.shape[0], -1)[order]
        if record.type in BLOCK_SCHEMES:
            return unpack(raw, BLOCK_SCHEMES[record.type])
        if record.type in _FLOATS:
            return raw.view(_FLOATS[record.type]).view(record.shape)
        try:
            weights = gguf.quants.dequantize(raw.numpy(), gguf.GGMLQuantizationType[record.type])
        except (NotImplementedError, ValueError) as error:
            raise CheckpointError(
                f"{container.path}: {record.name} has the ggml type {record.type}, which cannot be read"
            ) from error
        return torch.from_numpy(weights).view(record.shape)

    def activation_bits(self, name: str) -> int:
        """16: block schemes quantize weights only."""
        return 16

    def stated(self, key: str) -> Any:
        """A number, text or list of the metadata; None where there is none."""
        found = self._containers[0].metadata.get(key)
        return None if found is None else found.value

    def vocabulary(self) -> Vocabulary:
        """The vocabulary in the file; its digest tells whether a base model has the same."""
        return gguf_vocabulary(self._containers[0])

    def _add(self, container: Container, record: TensorRecord) -> None:
        if record.name == ROPE_FACTORS:
            return
        name = from_gguf(record.name)
        if name is None:
            raise CheckpointError(f"{container.path}: tensor {record.name} has no counterpart in the base model")
        if name in self._origin:
            raise CheckpointError(f"{container.path}: tensor {record.name} stands in two of the split files")
        self._origin[name] = (container, record)
        if SHARED_KEY in container.metadata:
            self._shared.add(name)
