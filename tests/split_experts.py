"""Random experts that share codes, and a program that runs them and says how much memory that takes.

    python tests/split_experts.py FOLDER COUNT [apart]

prints a JSON list: resident bytes before, and after the first use of each of COUNT experts. `apart`: experts do not
know of each other's codes.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moqe.formats.compressed_tensors import CompressedTensorsWriter
from moqe.formats.safetensors_folder import SafetensorsFolder, in_block, save_tensors
from moqe.models.skeleton import assign, build_skeleton
from moqe.quantized import IntegerTensor, Quantized
from moqe.schemes import Scheme

TOKENS = torch.arange(48).view(2, 24) * 7 % 128


def surroundings(folder: Path, architecture: str = "Qwen3", **sizes: int) -> Path:
    """A base model of which only what lies around the blocks is on disk."""
    import transformers

    config = getattr(transformers, f"{architecture}Config")(
        **{"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "vocab_size": 128, **sizes},
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        tie_word_embeddings=True,
    )
    config.save_pretrained(folder)
    around = {
        "model.embed_tokens.weight": torch.randn(config.vocab_size, config.hidden_size).bfloat16(),
        "model.norm.weight": torch.ones(config.hidden_size, dtype=torch.bfloat16),
    }
    save_tensors(folder / "model.safetensors", around)
    return folder


def random_block(skeleton: nn.Module, block: int, target: Scheme) -> dict[str, Quantized | Tensor]:
    """Parameters of a block: random codes for linears, floats for the rest."""
    prefix = f"model.layers.{block}."
    return {
        name: random_codes(*parameter.shape, target) if parameter.ndim == 2 else torch.rand(parameter.shape).bfloat16()
        for name, parameter in skeleton.named_parameters()
        if name.startswith(prefix)
    }


def random_codes(rows: int, columns: int, target: Scheme) -> IntegerTensor:
    """A weight matrix of codes drawn evenly, of a size that keeps activations in bounds."""
    low, high = target.levels
    groups = columns // (target.group_size or columns)
    codes = torch.randint(low, high + 1, (rows, columns), dtype=torch.int8 if target.symmetric else torch.uint8)
    scale = (torch.rand(rows, groups) + 0.5).bfloat16() / (high - low) / columns**0.5
    zero = None if target.symmetric else torch.randint(low, high + 1, (rows, groups), dtype=torch.uint8)
    return IntegerTensor(codes, scale, zero, target)


def write_experts(folder: Path, base: Path, target: Scheme, count: int) -> list[Path]:
    """`count` experts in `folder`, all with the codes of the first one and scales of their own; and `shared/`."""
    skeleton = build_skeleton(base, torch.float32)
    blocks = int(getattr(skeleton.config, "num_hidden_layers"))  # noqa: B009
    paths = [folder / f"e{number}" for number in range(count)]
    arguments = (base, folder / "shared", target, blocks)
    writers = [
        CompressedTensorsWriter(path, *arguments, split=True, codes_of=paths[0] if path != paths[0] else None)
        for path in paths
    ]
    for block in range(blocks):
        tensors = random_block(skeleton, block, target)
        for number, writer in enumerate(writers):
            writer.write(block, {name: _scaled(value, 1 + number / 16) for name, value in tensors.items()})
    for writer in writers:
        writer.finish()
    return paths


def _scaled(value: Quantized | Tensor, factor: float) -> Quantized | Tensor:
    if isinstance(value, IntegerTensor):
        return IntegerTensor(value.codes, value.scale * factor, value.zero_point, value.scheme)
    return value


def open_skeleton(base: Path, shared: Path) -> Any:
    """The model around the blocks, which lie on the meta device."""
    skeleton: Any = build_skeleton(base, torch.float32)
    files = SafetensorsFolder(shared)
    for name in files.names():
        assert not in_block(name)
        assign(skeleton, name, files.tensor(name).float())
    skeleton.get_output_embeddings().weight = skeleton.get_input_embeddings().weight
    return skeleton


def resident() -> int:
    """Bytes of this process in memory now, without what the allocator keeps of temporaries."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main(arguments: Sequence[str]) -> None:
    """Run experts of a folder, one after the other."""
    from moqe.formats.compressed_tensors_files import CompressedTensorsFiles
    from moqe.formats.shared_codes import SharedCodes
    from moqe.runtimes.reference import ReferenceRuntime

    torch.set_num_threads(1)
    folder = Path(arguments[0])
    skeleton = open_skeleton(folder / "base", folder / "shared")
    codes = SharedCodes()
    paths = [folder / f"e{number}" for number in range(int(arguments[1]))]
    first = ReferenceRuntime(skeleton, CompressedTensorsFiles(paths[0]), codes=codes)
    first.score(TOKENS[:1, :8])  # loads what of the libraries is loaded on first use
    first.release()
    runtimes, grown = [], [resident()]
    for path in paths:
        own = SharedCodes() if "apart" in arguments else codes
        runtimes.append(ReferenceRuntime(skeleton, CompressedTensorsFiles(path), name=path.name, codes=own))
        runtimes[-1].score(TOKENS[:1, :8])
        grown.append(resident())
    sys.stdout.write(json.dumps(grown))


if __name__ == "__main__":
    main(sys.argv[1:])
