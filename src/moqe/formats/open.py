"""Opening an expert whatever its format, and whether its tokenizer and its computation are the base model's."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from moqe.errors import CheckpointError
from moqe.formats.awq_checkpoint import open_awq
from moqe.formats.compressed_tensors_files import CompressedTensorsFiles
from moqe.formats.expert_files import ExpertFiles
from moqe.formats.float_checkpoint import FloatFiles
from moqe.formats.gguf_architecture import architecture_metadata
from moqe.formats.gguf_files import GgufFiles
from moqe.formats.gguf_tokenizer import read_vocabulary
from moqe.formats.gptq_checkpoint import open_gptq
from moqe.store import read_json

READERS: dict[str, Callable[[Path, Mapping[str, Any]], ExpertFiles]] = {
    "compressed-tensors": lambda folder, config: CompressedTensorsFiles(folder),
    "gptq": open_gptq,
    "awq": open_awq,
}

# What of a config, beside the rotation, decides what is computed from the same weights.
_COMPUTATION = (
    "model_type",
    "hidden_act",
    "rms_norm_eps",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "sliding_window",
    "layer_types",
)


def is_gguf(path: Path) -> bool:
    """Whether a path is a GGUF file, or a folder of them without safetensors."""
    if path.is_dir():
        return any(path.glob("*.gguf")) and not any(path.glob("*.safetensors"))
    return path.suffix == ".gguf"


def open_expert(path: Path) -> ExpertFiles:
    """Open an expert's folder, or a `.gguf` file, for reading.

    The format is what `quant_method` in config.json says; without quantization it is a full-precision folder.
    Raises CheckpointError when the path holds no expert, or one in a format MoQE does not run exactly.
    """
    if not path.exists():
        raise CheckpointError(f"{path} does not exist: check the path of the checkpoint")
    if is_gguf(path):
        return GgufFiles(path)
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path} is no expert: it is neither a .gguf file nor a folder with a config.json")
    quantization = read_json(path / "config.json").get("quantization_config")
    if not quantization:
        return FloatFiles(path)
    method = str(quantization.get("quant_method", ""))
    if method not in READERS:
        known = ", ".join([*READERS, "GGUF"])
        raise CheckpointError(f"{path} is quantized with {method or 'an unnamed method'}; MoQE reads {known}")
    return READERS[method](path, quantization)


def same_tokenizer(base: Path, checkpoint: Path) -> None:
    """Raise CheckpointError unless a checkpoint gives token ids the base model's meaning.

    base: a folder with tokenizer.json. checkpoint: a folder or GGUF. Pieces, their ids and the merges must agree;
    formatting may differ, and so may added tokens that only one of the two has.
    """
    if is_gguf(checkpoint):
        files = GgufFiles(checkpoint)
        if files.vocabulary().digest != read_vocabulary(base).digest:
            raise _another_tokenizer(base, checkpoint, "their pieces differ")
        return
    ours, our_added, our_merges = _read_tokenizer(base)
    theirs, their_added, their_merges = _read_tokenizer(checkpoint)
    differing = {token for token in ours.keys() & theirs.keys() if ours[token] != theirs[token]}
    one_sided = (ours.keys() - theirs.keys() - our_added) | (theirs.keys() - ours.keys() - their_added)
    by_id = {number: token for token, number in ours.items()}
    reused = {token for token, number in theirs.items() if by_id.get(number, token) != token}
    if differing or one_sided or reused:
        example = min(differing | one_sided | reused)
        raise _another_tokenizer(base, checkpoint, f"for example in {example!r}")
    if our_merges != their_merges:
        raise _another_tokenizer(base, checkpoint, "their merges differ")


def same_computation(base: Path, checkpoint: Path) -> None:
    """Raise CheckpointError where a checkpoint asks for another computation with its weights than the base model.

    base: a folder with config.json. checkpoint: a folder or GGUF; one that states nothing is taken for the base's. An
    expert runs with the base's config, so another rotation, say, would make another model of it.
    """
    config = AutoConfig.from_pretrained(base)
    if is_gguf(checkpoint):
        files = GgufFiles(checkpoint)
        ours = {
            key: stated.value
            for key, stated in architecture_metadata(config, "F32").items()
            if ".attention." in key or ".rope." in key
        }
        theirs = {key: value for key in ours if (value := files.stated(key)) is not None}
    elif (checkpoint / "config.json").is_file() and "model_type" in read_json(checkpoint / "config.json"):
        try:
            theirs = _computation(AutoConfig.from_pretrained(checkpoint))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{checkpoint / 'config.json'} is not a known config ({error}): choose a checkpoint made from {base}"
            ) from error
        ours = _computation(config)
    else:
        return
    for key, value in theirs.items():
        if not _alike(ours.get(key), value):
            raise CheckpointError(
                f"{checkpoint} has {key} {value} and the base model {base} {ours.get(key)}: as an expert it would be "
                "run as the base is; choose a checkpoint made from this base"
            )


def _computation(config: Any) -> dict[str, Any]:
    found = {key: getattr(config, key, None) for key in _COMPUTATION}
    found["head_dim"] = found["head_dim"] or config.hidden_size // config.num_attention_heads
    rope = getattr(config, "rope_parameters", None) or {}
    return found | {f"rope_parameters.{key}": value for key, value in rope.items()}


def _alike(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, int | float) and isinstance(theirs, int | float):
        return math.isclose(ours, theirs, rel_tol=1e-6)  # GGUF files hold float32
    return bool(ours == theirs)


def _read_tokenizer(folder: Path) -> tuple[dict[str, int], set[str], list[str]]:
    """Ids by token, the tokens that were added to the model's own, and the merges as `left right`."""
    path = folder / "tokenizer.json"
    content = read_json(path)
    try:
        model = content["model"]
        vocabulary = model["vocab"]
        if isinstance(vocabulary, list):  # a Unigram model: pieces with scores, in the order of their ids
            vocabulary = {piece: number for number, (piece, _) in enumerate(vocabulary)}
        ids = {str(token): int(number) for token, number in vocabulary.items()}
        added = {str(token["content"]): int(token["id"]) for token in content.get("added_tokens") or ()}
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges") or ()]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} is no tokenizer ({error!r}): download it again") from error
    return ids | added, set(added), merges


def _another_tokenizer(base: Path, checkpoint: Path, how: str) -> CheckpointError:
    return CheckpointError(
        f"{checkpoint} has another tokenizer than the base model {base} ({how}): "
        "all experts of a mixture must share one; choose a checkpoint made from this base"
    )
