"""Compressed-tensors folders: what `transformers` and `vllm serve` load as they are. Written here.

Format: safetensors shards, an index and a `config.json` whose `quantization_config` says how linears are stored.
    pack-quantized   <linear>.weight_packed   int32 (out, words), codes as unsigned bit stream along the inputs
                     <linear>.weight_shape    int64 (2,): out, in
                     <linear>.weight_zero_point  int32 (words, groups), packed along the outputs; asymmetric only
    int-quantized    <linear>.weight          int8 (out, in), signed codes
                     <linear>.weight_zero_point  int8 (out, groups); asymmetric only
    both             <linear>.weight_scale    (out, groups), in the type of the base model

Our shard 1 holds what all experts of a mixture share and is a hard link to `<mixture>/shared/`; shard k + 2 is decoder
block k, so an interrupted build goes on at the first block whose file is absent. Which linears were kept in full
precision or have another group size is read back from the shards, so a resumed build needs no other memory of them.

An expert whose scales are distilled has two shards a block: `codes-...` with codes and zero points, and `scales-...`
with the rest. Experts that share codes have hard links to one file of codes, so each costs its scales only, and each
folder is still one that others load.

Cost: one block in memory at a time. Limits, checked with transformers 5.23 and compressed-tensors 0.20: asymmetric
packed weights load only with `dequantize=True` (the loader expects their zero points unpacked), which in turn drops the
quantization of activations, so a8 experts must be loaded without it. vLLM wants one scheme for the linears it fuses
(q/k/v, gate/up), 4 or 8 bits, and symmetric weights where activations are integers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from moqe.errors import CheckpointError
from moqe.formats.bit_packing import pack
from moqe.formats.compressed_tensors_config import PACKED, storage_format, write_config
from moqe.formats.safetensors_folder import INDEX, SafetensorsFolder, in_block, read_header, read_tensor, save_tensors
from moqe.quantized import IntegerTensor, Quantized
from moqe.schemes import Scheme
from moqe.store import atomic, link, read_json, write_json

SHARED_TENSORS = "model-shared.safetensors"
SURROUNDINGS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)


def write_shared(base: Path, shared: Path) -> None:
    """Store once what all experts of a mixture share: embeddings, final norm, untied head, tokenizer files.

    base: a full-precision folder of safetensors. Files that exist already are left alone.
    """
    for name in SURROUNDINGS:
        if (base / name).is_file() and not (shared / name).exists():
            with atomic(shared / name) as partial:
                partial.write_bytes((base / name).read_bytes())
    if (shared / SHARED_TENSORS).exists():
        return
    source = SafetensorsFolder(base)
    tied = bool(read_json(base / "config.json").get("tie_word_embeddings", False))
    names = [name for name in source.names() if not in_block(name) and not (tied and name == "lm_head.weight")]
    save_tensors(shared / SHARED_TENSORS, {name: source.tensor(name) for name in names})


class CompressedTensorsWriter:
    """Writes one expert. Satisfies `ExpertWriter`. base: the model's folder; shared: see `write_shared`.

    split: keep codes and scales in files of their own. codes_of: the folder of a split expert whose files of codes are
    linked in place of writing the same again; what is given to `write` must then have its codes.
    """

    def __init__(
        self,
        folder: Path,
        base: Path,
        shared: Path,
        scheme: Scheme,
        number_of_blocks: int,
        *,
        split: bool = False,
        codes_of: Path | None = None,
    ) -> None:
        self.folder, self.base, self.shared = folder, base, shared
        self.scheme, self.number_of_blocks = scheme, number_of_blocks
        self.codes_of = codes_of
        self._kinds = ("codes", "scales") if split or codes_of is not None else ("model",)

    def _shard(self, number: int, kind: str = "model") -> Path:
        return self.folder / f"{kind}-{number:05d}-of-{self.number_of_blocks + 1:05d}.safetensors"

    def _shards(self, block: int) -> list[Path]:
        return [self._shard(block + 2, kind) for kind in self._kinds]

    def has(self, block: int) -> bool:
        """Whether block `block` is already on disk, whole."""
        return all(path.exists() for path in self._shards(block))

    def write(self, block: int, tensors: Mapping[str, Quantized | Tensor]) -> None:
        """Write all parameters of one decoder block, by the base model's full parameter names.

        Raises CheckpointError on a tensor whose bits or symmetry are not the expert's scheme.
        """
        stored: dict[str, Tensor] = {}
        for name, value in tensors.items():
            stored.update({name: value} if isinstance(value, Tensor) else self._encode(name, value))
        if self._kinds == ("model",):
            save_tensors(self._shard(block + 2), stored)
            return
        scaled = {name.removesuffix("_scale") for name in stored if name.endswith(".weight_scale")}
        fixed = {f"{weight}{field}" for weight in scaled for field in ("", "_packed", "_shape", "_zero_point")}
        codes = {name: tensor for name, tensor in stored.items() if name in fixed}
        path = self._shard(block + 2, "codes")
        if self.codes_of is not None:
            link(self.codes_of / path.name, path)
        else:
            save_tensors(path, codes)
        save_tensors(
            self._shard(block + 2, "scales"), {name: part for name, part in stored.items() if name not in codes}
        )

    def link_scales(self, block: int, folder: Path) -> None:
        """Take over a block of another split expert with the same codes, scales included."""
        for path in self._shards(block):
            link(folder / path.name, path)

    def _encode(self, name: str, value: Quantized) -> dict[str, Tensor]:
        asked = (self.scheme.weight_bits, self.scheme.activation_bits, self.scheme.symmetric)
        got = (value.scheme.weight_bits, value.scheme.activation_bits, value.scheme.symmetric)
        if not isinstance(value, IntegerTensor) or asked != got:
            raise CheckpointError(f"{name}: a {value.scheme.name} tensor does not fit an expert of {self.scheme.name}")
        return encode(name.removesuffix(".weight"), value)

    def finish(self) -> None:
        """Link the shared shard and the tokenizer, write the index and, last, config.json, which makes it loadable."""
        write_shared(self.base, self.shared)
        link(self.shared / SHARED_TENSORS, self._shard(1))
        for name in SURROUNDINGS:
            if (self.shared / name).exists():
                link(self.shared / name, self.folder / name)
        weight_map: dict[str, str] = {}
        total = 0
        kept: list[str] = []
        other_groups: dict[int, list[str]] = defaultdict(list)
        for paths in ([self._shard(1)], *(self._shards(block) for block in range(self.number_of_blocks))):
            headers = {path: read_header(path) for path in paths}
            for path, header in headers.items():
                weight_map.update(dict.fromkeys(sorted(header), path.name))
                total += sum(entry["data_offsets"][1] - entry["data_offsets"][0] for entry in header.values())
            if paths == [self._shard(1)]:
                continue
            entries = {name: entry for header in headers.values() for name, entry in header.items()}
            for name in sorted(entries):
                linear = name.removesuffix(".weight_scale")
                if linear != name:
                    size = self._group_size(paths[0], linear, {key: entry["shape"] for key, entry in entries.items()})
                    if size != self.scheme.group_size:
                        other_groups[size].append(linear)
                elif name.endswith(".weight") and len(entries[name]["shape"]) == 2 and entries[name]["dtype"] != "I8":
                    kept.append(name.removesuffix(".weight"))
        write_json(self.folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        config = read_json(self.base / "config.json")
        config["quantization_config"] = write_config(self.scheme, other_groups, kept)
        write_json(self.folder / "config.json", config)

    def _group_size(self, path: Path, linear: str, shapes: Mapping[str, list[int]]) -> int:
        """The group size a linear was stored with, 0 for a scale per channel."""
        groups = shapes[f"{linear}.weight_scale"][1]
        if groups == 1 and self.scheme.group_size == 0:
            return 0
        if storage_format(self.scheme) == PACKED:
            columns = int(read_tensor(path, f"{linear}.weight_shape")[1])
        else:
            columns = shapes[f"{linear}.weight"][1]
        size = columns // groups
        return 0 if groups == 1 and size != self.scheme.group_size else size


def encode(linear: str, tensor: IntegerTensor) -> dict[str, Tensor]:
    """The stored fields of a quantized linear, by their full names."""
    scheme, half = tensor.scheme, 1 << (tensor.scheme.weight_bits - 1)
    offset = half if scheme.symmetric else 0  # what makes codes unsigned
    fields = {"weight_scale": tensor.scale}
    unsigned = tensor.codes.to(torch.int16) + offset
    if storage_format(scheme) == PACKED:
        fields["weight_packed"] = pack(unsigned, scheme.weight_bits)
        fields["weight_shape"] = torch.tensor(tensor.codes.shape, dtype=torch.int64)
        if tensor.zero_point is not None:
            fields["weight_zero_point"] = pack(tensor.zero_point.T, scheme.weight_bits).T
    else:
        fields["weight"] = (unsigned - half).to(torch.int8)
        if tensor.zero_point is not None:
            fields["weight_zero_point"] = (tensor.zero_point.to(torch.int16) - half).to(torch.int8)
    return {f"{linear}.{field}": value for field, value in fields.items()}
