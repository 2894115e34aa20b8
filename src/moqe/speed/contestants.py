"""Who is measured: every expert in a runtime that is made to be fast, the router alone, and the mixture of both.

Language experts answer prompts of real text with a fixed number of tokens, greedily. An image is noise as an encoded
file, and an answer begins with decoding it.
"""

from __future__ import annotations

import io
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moqe.data.bundled import bundled_documents
from moqe.errors import MissingExtra, MoqeError, did_you_mean
from moqe.folder import MixtureFolder
from moqe.formats import open_expert
from moqe.formats.gguf_export import write_gguf
from moqe.formats.open import is_gguf
from moqe.mixture import ImageMixture, LanguageMixture, load, read_manifest
from moqe.progress import Progress
from moqe.runtimes.llamacpp import LlamaCppRuntime
from moqe.runtimes.packed.runtime import COMPILED
from moqe.runtimes.runtime import Runtime
from moqe.speed.timing import Contestant

LLAMA, PACKED, ONNX = "llama.cpp", "packed", "onnx"
RUNTIMES: dict[str, tuple[str, ...]] = {
    "language": (PACKED, "packed-float32", COMPILED, LLAMA),
    "image-classification": (ONNX,),
}
"""The runtimes that can be measured, by task; without a wish GGUF experts run in llama.cpp and others packed."""

MIXTURE, ROUTER = "mixture", "router"
_TEXT = "bundled:python-topics/test"
_IMAGE_SIDE = 256
_DIFFERENT = 8  # requests that differ; further ones repeat them


def check_runtime(folder: Path, runtime: str | None) -> None:
    """Raise MoqeError for a runtime whose speed says nothing about the mixture, or that its task does not have."""
    if runtime in ("reference", "bfloat16"):
        raise MoqeError(
            "the reference runtime is exact and not made to be fast: its latency and memory say nothing about an "
            "expert; leave --runtime out, or choose another"
        )
    task = read_manifest(MixtureFolder(folder))["task"]
    if runtime is not None and runtime not in RUNTIMES[task]:
        raise MoqeError(f"no runtime {runtime!r} for {task}; {did_you_mean(runtime, RUNTIMES[task])}")


def contestants(
    folder: Path, runtime: str | None, work: Path, prompt_tokens: int, new_tokens: int, progress: Progress
) -> list[Contestant]:
    """Everybody who takes part: the experts in their order, the router, the mixture. Nothing is loaded yet.

    work: where experts are exported to that have to be GGUF and are not. Raises CheckpointError when the folder is
    damaged or an expert cannot be exported.
    """
    if read_manifest(MixtureFolder(folder))["task"] == "language":
        return _language(folder, runtime, work, prompt_tokens, new_tokens, progress)
    return _images(folder, progress)


def _language(
    folder: Path, runtime: str | None, work: Path, prompt_tokens: int, new_tokens: int, progress: Progress
) -> list[Contestant]:
    # In llama.cpp files are opened one by one, from `work`: writing them would stay in this process's memory.
    opened = "reference" if runtime == LLAMA else runtime or PACKED
    mixture = load(folder, progress=progress, runtime=opened)
    assert isinstance(mixture, LanguageMixture)
    requests = prompts(mixture.tokenizer, prompt_tokens)
    engines: dict[str, Runtime] = {}
    for name in mixture.experts:
        place = mixture.folder.expert(name)
        if runtime == LLAMA or (runtime is None and is_gguf(place)):
            path = place if is_gguf(place) else _exported(place, work / f"{name}.gguf", mixture.folder.shared)
            mixture.use(name, LlamaCppRuntime(path, name=name, context_tokens=prompt_tokens + new_tokens))
        engines[name] = mixture.runtime(name)

    def choose(request: int) -> str:
        return mixture.route(requests[request % len(requests)]).expert

    def answer(tokens: int, request: int, name: str | None = None) -> int:
        expert = choose(request) if name is None else name
        return len(engines[expert].generate(requests[request % len(requests)][None], tokens))

    found = [
        Contestant(name, "expert", engine.name, partial(answer, new_tokens, name=name), partial(answer, 1, name=name))
        for name, engine in engines.items()
    ]
    names = sorted({engine.name for engine in engines.values()})
    router = Contestant(ROUTER, ROUTER, "torch", lambda request: 0 * len(choose(request)))
    whole = Contestant(MIXTURE, MIXTURE, ", ".join(names), partial(answer, new_tokens), partial(answer, 1))
    return [*found, router, whole]


def prompts(tokenizer: Any, length: int) -> list[Tensor]:
    """A few prompts of `length` tokens from text that comes with Python: int64 (length,) each."""
    ids: list[int] = []
    for document in bundled_documents(_TEXT):
        ids += tokenizer(document.text, add_special_tokens=False)["input_ids"]
        if len(ids) >= _DIFFERENT * length:
            break
    ids = (ids * (1 + _DIFFERENT * length // len(ids)))[: _DIFFERENT * length]
    return list(torch.tensor(ids).view(_DIFFERENT, length))


def _exported(place: Path, path: Path, shared: Path) -> Path:
    """An expert of integer codes as GGUF, its weights unchanged."""
    if not path.exists():
        write_gguf(path, open_expert(place), shared)
    return path


def _images(folder: Path, progress: Progress) -> list[Contestant]:
    mixture = load(folder, progress=progress)
    assert isinstance(mixture, ImageMixture)
    requests = pictures()

    def answer(request: int, name: str | None = None) -> int:
        mixture.classify(requests[request % len(requests)], expert=name)
        return 0

    def choose(request: int) -> int:
        mixture.route(requests[request % len(requests)])
        return 0

    found = [Contestant(name, "expert", ONNX, partial(answer, name=name)) for name in mixture.experts]
    return [*found, Contestant(ROUTER, ROUTER, ONNX, choose), Contestant(MIXTURE, MIXTURE, ONNX, answer)]


def pictures() -> list[bytes]:
    """A few images of noise as PNG files."""
    try:
        from PIL import Image
    except ModuleNotFoundError:
        raise MissingExtra("pillow", "vision", "timing image experts") from None
    random = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (_DIFFERENT, _IMAGE_SIDE, _IMAGE_SIDE, 3), generator=random, dtype=torch.uint8)
    found = []
    for pixels in noise:
        handle = io.BytesIO()
        Image.fromarray(pixels.numpy()).save(handle, "png")
        found.append(handle.getvalue())
    return found
