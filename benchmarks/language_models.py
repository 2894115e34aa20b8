"""The models and experts that `latency_language` and `latency_mixture` time: written once, then found again."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

import moqe
from moqe.bundled import bundled_model
from moqe.formats.compressed_tensors import SURROUNDINGS, CompressedTensorsWriter
from moqe.formats.compressed_tensors_files import CompressedTensorsFiles
from moqe.formats.gguf_export import write_gguf
from moqe.formats.safetensors_folder import save_tensors
from moqe.methods.rtn import rtn
from moqe.models.decoder import Decoder
from moqe.quantized import Quantized
from moqe.schemes import Scheme, scheme

LAYERS = 8
EXPERTS: dict[str, Scheme] = {
    "int8": scheme("w8a8"),
    "int4": scheme("w4a16", group_size=32),
    "q8_0": scheme("w8a16", group_size=32),  # what becomes Q8_0 without loss
}
_CONFIG = ("config.json", *SURROUNDINGS)


def write_random_qwen3(folder: Path) -> None:
    """A base with Qwen3-0.6B's shapes, 8 of its 28 layers, random weights and the bundled model's tokenizer."""
    if (folder / "model.safetensors").exists():
        return
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=151936,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=LAYERS,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        tie_word_embeddings=True,
        rms_norm_eps=1e-6,
    )
    for name in SURROUNDINGS:
        if (bundled_model("tiny-qwen3") / name).exists():
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(bundled_model("tiny-qwen3") / name, folder / name)
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def write_bfloat16(source: Path, folder: Path) -> None:
    """A model's folder with its tensors in bfloat16, so that nobody has to carry more."""
    if (folder / "model.safetensors").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    for name in _CONFIG:
        if (source / name).exists():
            shutil.copy(source / name, folder / name)
    tensors = load_file(source / "model.safetensors")
    save_tensors(folder / "model.safetensors", {name: tensor.bfloat16() for name, tensor in tensors.items()})


def write_experts(base: Path, folder: Path) -> dict[str, Path]:
    """Round-to-nearest experts of a base as folders, and the last two as GGUF files too, by name."""
    for name, target in EXPERTS.items():
        expert = folder / name
        if not (expert / "config.json").exists():
            decoder = Decoder.open(str(base))
            writer = CompressedTensorsWriter(expert, base, folder / "shared", target, decoder.number_of_blocks)
            for index in range(decoder.number_of_blocks):
                parameters = {n: p.detach() for n, p in decoder.load_block(index).named_parameters()}
                prefix = decoder.block_names[index]
                writer.write(index, {f"{prefix}.{n}": _rounded(p, target) for n, p in parameters.items()})
                decoder.release_block(index)
            writer.finish()
    files = {"q4_0.gguf": "int4", "q8_0.gguf": "q8_0"}
    for file, name in files.items():
        if not (folder / file).exists():
            write_gguf(folder / file, CompressedTensorsFiles(folder / name), base, rounding=True)
    return {name: folder / name for name in (*EXPERTS, *files)}


def _rounded(parameter: Tensor, target: Scheme) -> Quantized | Tensor:
    return rtn(parameter.float(), target, torch.bfloat16) if parameter.ndim == 2 else parameter.bfloat16()


def build_mixture(base: Path, folder: Path) -> Path:
    """A mixture of four 4-bit experts with the paper's network, trained on a few texts, as its router; its folder.

    The guard is off: it would put a constant in the network's place, whose latency is not what is asked for.
    """
    if (folder / "mixture.json").exists():
        return folder
    parts = {"calibration": "train", "router": "router", "test": "test"}
    data = {name: [f"bundled:python-code/{part}", f"bundled:python-docstrings/{part}"] for name, part in parts.items()}
    grids = [(32, True), (32, False), (64, True), (64, False)]
    content = {
        "base": str(base),
        "runtime": "packed",
        "data": {**data, "window": 256, "calibration_samples": 4, "router_samples": 64, "test_samples": 32},
        "experts": [
            {"name": f"e{number}", "method": "rtn", "scheme": "w4a16", "group_size": size, "symmetric": symmetric}
            for number, (size, symmetric) in enumerate(grids)
        ],
        "router": {"preset": "paper", "guard": False},
        "protocol": {"route_on": "prefix", "prefix": 64},
        "bootstrap_samples": 100,
    }
    moqe.build(moqe.parse_recipe(content), folder)
    return folder
