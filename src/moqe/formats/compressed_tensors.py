"""Compressed-tensors folders: what `transformers` and `vllm serve` load as they are. Written and read here.

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
from moqe.formats.bit_packing import pack, packed_words, unpack
from moqe.formats.compressed_tensors_config import PACKED, read_config, storage_format, write_config
from moqe.formats.grouped_codes import grouped
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
_FIELDS = (".weight_packed", ".weight_scale", ".weight_shape", ".weight_zero_point", ".weight_g_idx")


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
    """Writes one expert. Satisfies `ExpertWriter`. base: the model's folder; shared: see `write_shared`."""

    def __init__(self, folder: Path, base: Path, shared: Path, scheme: Scheme, number_of_blocks: int) -> None:
        self.folder, self.base, self.shared = folder, base, shared
        self.scheme, self.number_of_blocks = scheme, number_of_blocks

    def _shard(self, number: int) -> Path:
        return self.folder / f"model-{number:05d}-of-{self.number_of_blocks + 1:05d}.safetensors"

    def has(self, block: int) -> bool:
        """Whether block `block` is already on disk, whole."""
        return self._shard(block + 2).exists()

    def write(self, block: int, tensors: Mapping[str, Quantized | Tensor]) -> None:
        """Write all parameters of one decoder block, by the base model's full parameter names.

        Raises CheckpointError on a tensor whose bits or symmetry are not the expert's scheme.
        """
        stored: dict[str, Tensor] = {}
        for name, value in tensors.items():
            stored.update({name: value} if isinstance(value, Tensor) else self._encode(name, value))
        save_tensors(self._shard(block + 2), stored)

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
        for number in range(1, self.number_of_blocks + 2):
            path = self._shard(number)
            header = read_header(path)
            weight_map.update(dict.fromkeys(sorted(header), path.name))
            total += sum(entry["data_offsets"][1] - entry["data_offsets"][0] for entry in header.values())
            if number == 1:
                continue
            shapes = {name: entry["shape"] for name, entry in header.items()}
            for name in sorted(shapes):
                linear = name.removesuffix(".weight_scale")
                if linear != name:
                    size = self._group_size(path, linear, shapes)
                    if size != self.scheme.group_size:
                        other_groups[size].append(linear)
                elif name.endswith(".weight") and len(shapes[name]) == 2 and header[name]["dtype"] != "I8":
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


class CompressedTensorsFiles:
    """A compressed-tensors folder opened for reading, ours or llm-compressor's. Satisfies `ExpertFiles`.

    Raises CheckpointError when files are missing or damaged, or stored in a way MoQE does not run exactly.
    """

    format = "compressed-tensors"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        config = read_json(folder / "config.json")
        self._formats = read_config(config.get("quantization_config") or {}, str(folder / "config.json"))
        self._files = SafetensorsFolder(folder)

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
            return self._files.tensor(name)
        if scheme is None:
            raise CheckpointError(f"{self.folder}: {linear} is quantized, but no config group covers it")
        try:
            return self._decode(linear, scheme)
        except (ValueError, RuntimeError) as error:
            where = self._files.path(f"{linear}.weight_scale")
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
