"""A mixture from its folder. What it can do depends on its task: one file a task, one line here."""

from __future__ import annotations

from pathlib import Path

from moqe.errors import CheckpointError, did_you_mean
from moqe.folder import MixtureFolder
from moqe.mixture.images import Classification, ImageMixture
from moqe.mixture.language import Generation, LanguageMixture, Score
from moqe.mixture.manifest import FORMAT_VERSION, inspect, read_manifest, verify_mixture
from moqe.mixture.mixture import Decision, Mixture
from moqe.progress import Progress

MIXTURES: dict[str, type[Mixture]] = {
    "language": LanguageMixture,
    "image-classification": ImageMixture,
}

__all__ = [
    "FORMAT_VERSION",
    "MIXTURES",
    "Classification",
    "Decision",
    "Generation",
    "ImageMixture",
    "LanguageMixture",
    "Mixture",
    "Score",
    "inspect",
    "load",
    "read_manifest",
    "verify_mixture",
]


def load(
    folder: Path | str, device: str = "cpu", progress: Progress | None = None, runtime: str | None = None
) -> Mixture:
    """Open a mixture's folder. `progress` shows files being verified.

    runtime: what runs the experts. Texts: `reference` (the default: exact), `packed` (low-bit kernels), and others, see
    `moqe.runtimes.texts`. Images: `onnx`.
    Raises CheckpointError when the folder is half-built, damaged, no mixture, or of a task this version lacks;
    MoqeError for a runtime that the task has not; ModelError for a model that the runtime cannot run.
    """
    task = read_manifest(MixtureFolder(Path(folder)))["task"]
    if task not in MIXTURES:
        raise CheckpointError(f"{folder} is a mixture for {task!r}; {did_you_mean(task, MIXTURES)}")
    return MIXTURES[task](folder, device, progress, runtime)
