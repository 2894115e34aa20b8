"""A mixture's experts as plain files for other programs: one file or folder an expert, nothing linked, nothing of MoQE.

    out/mine-gguf/                  export("out/mine", "gguf")
      awq.gguf  awq.Modelfile       one file with everything in it, for llama.cpp, LM Studio and, by the second, Ollama
      gptq.gguf  gptq.Modelfile
      export.json                   written last: what is here, digests, and what is not exact

`gguf` takes language experts of integer and block schemes. `compressed-tensors` copies the folders of integer experts,
which `transformers` and `vllm serve` load. `onnx` copies the files of image experts, with the names of the classes and
the preprocessing beside them. The router stays behind: these programs run one expert each.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moqe.errors import FolderBusy, MoqeError, did_you_mean
from moqe.folder import MixtureFolder
from moqe.formats import merge_gguf, open_expert
from moqe.formats.gguf_export import write_gguf
from moqe.formats.gguf_files import GgufFiles
from moqe.mixture import read_manifest
from moqe.mixture.manifest import verify_files, within
from moqe.models.image_shared import DESCRIPTION
from moqe.progress import Progress, Silent
from moqe.recipe import load_recipe
from moqe.store import atomic, digest_files, disk_bytes, require_room, write_json, write_text
from moqe.tasks.image_expert_files import expert_file
from moqe.version import __version__

MANIFEST = "export.json"


@dataclass(frozen=True)
class Export:
    """What was written: the folder, the format, and for every expert its files and what is special about them."""

    folder: Path
    to: str
    experts: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class _Job:
    """One export: where from, where to, whether scales may be rounded, and who is told."""

    place: MixtureFolder
    out: Path
    rounding: bool
    progress: Progress


def export(
    folder: Path | str,
    to: str,
    out: Path | str | None = None,
    *,
    experts: Sequence[str] = (),
    rounding: bool = False,
    progress: Progress | None = None,
) -> Export:
    """Write the experts of a mixture as files of format `to`: `gguf`, `compressed-tensors` or `onnx`.

    out: a new or empty folder; by default the mixture's name followed by the format. experts: names, by default all.
    rounding: let GGUF round scales and offsets to float16 where that makes a file possible or smaller; export.json
    then says what was rounded and by how much.
    Raises MoqeError for a format that the task has not, or an unknown expert; CheckpointError when a file is damaged or
    a tensor cannot be written exactly; FolderBusy when `out` holds files already; DiskFull.
    """
    place, shown = MixtureFolder(Path(folder)), progress or Silent()
    manifest = read_manifest(place)
    if to not in EXPORTERS:
        raise MoqeError(f"no format {to!r} to export to; {did_you_mean(to, EXPORTERS)}")
    task, write = EXPORTERS[to]
    if manifest["task"] != task:
        raise MoqeError(f"{place.path} is a mixture for {manifest['task']}, and {to} {_REASONS[to]}")
    for name in experts:
        if name not in manifest["experts"]:
            raise MoqeError(f"no expert {name!r} in {place.path}; {did_you_mean(name, manifest['experts'])}")
    chosen = tuple(experts) or tuple(manifest["experts"])
    target = Path(out) if out is not None else place.path.with_name(f"{place.path.name}-{to}")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FolderBusy(f"{target} is there already: choose a new or empty folder with --out")
    expected = within(place.shared, manifest["shared"])
    for name in chosen:
        expected |= within(place.expert(name), manifest["experts"][name]["files"])
    verify_files(expected, shown)
    require_room(target, sum(disk_bytes(place.expert(name)) for name in chosen))
    target.mkdir(parents=True, exist_ok=True)
    job = _Job(place, target, rounding, shown)
    try:
        written = {name: write(job, name) for name in chosen}
    except BaseException:
        shutil.rmtree(target)  # it was empty, and half an export could be taken for a whole one
        raise
    files = sorted(path for path in target.rglob("*") if path.is_file())
    digests = digest_files(files, "digest files", shown)
    content = {
        "format": to,
        "moqe": __version__,
        "base": load_recipe(place.recipe).base,
        "recipe": manifest["recipe"],
        "experts": written,
        "files": {str(path.relative_to(target)): digest for path, digest in zip(files, digests, strict=True)},
    }
    write_json(target / MANIFEST, content)
    return Export(target, to, written)


def _gguf(job: _Job, name: str) -> dict[str, Any]:
    path = job.out / f"{name}.gguf"
    expert = open_expert(job.place.expert(name))
    if isinstance(expert, GgufFiles):
        merge_gguf(job.place.expert(name), path)
        notes: dict[str, Any] = {"lossless": True}
    else:
        with job.progress.track(f"write {name}", 2 * len(expert.names())) as advance:
            found = write_gguf(path, expert, job.place.shared, rounding=job.rounding, advance=advance)
        notes = {"lossless": not found.rounded, "types": dict(found.types)}
        if found.rounded:
            notes["rounded"] = {tensor: asdict(rounding) for tensor, rounding in found.rounded.items()}
    write_text(job.out / f"{name}.Modelfile", f"FROM ./{path.name}\n")
    return {"file": path.name, **notes}


def _folder(job: _Job, name: str) -> dict[str, Any]:
    source, target = job.place.expert(name), job.out / name
    expert = open_expert(source)
    if expert.format != "compressed-tensors":
        others = [other for other in _integer_experts(job.place) if other != name]
        raise MoqeError(
            f"expert {name} is stored as {expert.format}, which has no compressed-tensors form: "
            + (f"choose others, --expert {' --expert '.join(others)}" if others else "export it to gguf")
        )
    files = sorted(path for path in source.iterdir() if path.is_file())
    with job.progress.track(f"copy {name}", len(files)) as advance:
        for path in files:
            _copy(path, target / path.name)
            advance(1)
    return {"folder": name}


def _onnx(job: _Job, name: str) -> dict[str, Any]:
    _copy(expert_file(job.place.expert(name)), job.out / f"{name}.onnx")
    if not (job.out / DESCRIPTION).exists():
        _copy(job.place.shared / DESCRIPTION, job.out / DESCRIPTION)
    return {"file": f"{name}.onnx"}


def _copy(source: Path, target: Path) -> None:
    """A file of its own, wherever `source` is linked to."""
    with atomic(target) as partial:
        shutil.copyfile(source, partial)


def _integer_experts(place: MixtureFolder) -> list[str]:
    """Experts in compressed-tensors folders."""
    names = read_manifest(place)["experts"]
    return [name for name in names if open_expert(place.expert(name)).format == "compressed-tensors"]


EXPORTERS: dict[str, tuple[str, Callable[[_Job, str], dict[str, Any]]]] = {
    "gguf": ("language", _gguf),
    "compressed-tensors": ("language", _folder),
    "onnx": ("image-classification", _onnx),
}
"""Formats: the task whose experts they hold, and what writes one expert."""

_REASONS = {
    "gguf": "holds language models",
    "compressed-tensors": "holds language models",
    "onnx": (
        "is written for image classifiers only: the files of language models lack a cache of keys and values, and no "
        "operator multiplies by codes of 3 bits or by blocks; choose gguf or compressed-tensors"
    ),
}
