"""From a recipe to a mixture's folder: split, calibrate, quantize, score, train, judge.

Each step leaves its result in the folder, and a step whose result is there is not done again: the same command resumes
an interrupted build, and ends with the same bytes as an undisturbed one. Nothing that differs between two runs (times,
host, paths) is written into the folder; times come back in the result.
"""

from __future__ import annotations

import logging
import resource
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from moqe.errors import RecipeChanged
from moqe.evaluate.verdict import Verdict, read_verdict
from moqe.folder import MixtureFolder
from moqe.measure import ROUTER_SPLITS, judge_mixture, measure_agreement, measured, score, train_routers
from moqe.mixture import FORMAT_VERSION, read_manifest, verify_mixture
from moqe.models.estimate import Estimate
from moqe.progress import Progress, Silent
from moqe.recipe import Recipe, dump_recipe, load_recipe
from moqe.store import digest_files, locked, read_json, require_room, write_json, write_text
from moqe.tasks import TASKS, Task
from moqe.version import __version__

log = logging.getLogger("moqe")


@dataclass(frozen=True)
class Plan:
    """What a build would do and take: the recipe's hash, the experts, and the estimate of `moqe.models.estimate`."""

    recipe: str
    base: str
    experts: Mapping[str, str]
    estimate: Estimate

    def summary(self) -> dict[str, Any]:
        """The plan as JSON values, units in the names."""
        numbers = asdict(self.estimate)
        seconds = numbers.pop("seconds")
        return {
            "recipe": self.recipe,
            "base": self.base,
            **numbers,
            **{f"{step}_seconds": round(value, 1) for step, value in seconds.items()},
            "experts": dict(self.experts),
        }


@dataclass
class Timings:
    """Seconds by step, and the process's peak memory in bytes."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Add the time of the block to step `name`."""
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    @property
    def peak_bytes(self) -> int:
        """The largest resident set so far."""
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@dataclass(frozen=True)
class BuildResult:
    """A finished build: where it is, what it found, how long each step took in this run."""

    folder: Path
    recipe: str
    verdict: Verdict
    seconds: Mapping[str, float]
    peak_bytes: int

    def summary(self) -> dict[str, Any]:
        """The result as JSON values."""
        return {
            "folder": str(self.folder),
            "recipe": self.recipe,
            "seconds": {name: round(value, 2) for name, value in self.seconds.items()},
            "peak_bytes": self.peak_bytes,
            "verdict": asdict(self.verdict),
        }

    def sentence(self) -> str:
        """Times and memory in one line."""
        steps = ", ".join(f"{name} {value:.0f} s" for name, value in self.seconds.items())
        return f"{steps}; peak memory {self.peak_bytes / 2**30:.2f} GiB; recipe {self.recipe}"


def build(
    recipe: Recipe | Path | str, folder: Path | str, *, device: str = "cpu", progress: Progress | None = None
) -> BuildResult:
    """Build a mixture, or finish a half-built one.

    Raises RecipeError and its kin before any work where the recipe cannot be done; RecipeChanged when the folder holds
    work of another recipe, base or data; FolderBusy while another process builds there.
    """
    parsed = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    place, shown, timings = MixtureFolder(Path(folder)), progress or Silent(), Timings()
    with locked(place.path):
        _refuse_other_work(place, parsed)
        if not place.manifest.exists():
            with timings.step("prepare"):
                task = TASKS[parsed.task](parsed, place.path, device)
                identity = task.identity(shown)
                if not place.recipe.exists():  # only now: a recipe that cannot be done claims no folder
                    write_text(place.recipe, dump_recipe(parsed))
                _check_identity(place, identity | _producers(device))
                require_room(place.path, task.disk_bytes_needed())
            with timings.step("experts"):
                task.make_experts(shown)
            with timings.step("losses"):
                score(task, parsed, place, ROUTER_SPLITS, shown)
            with timings.step("routers"):
                train_routers(task, parsed, place, shown)
            with timings.step("verdict"):
                judge_mixture(task, parsed, place, shown)
            _finish(place, parsed, task, identity, shown)
        shutil.rmtree(place.work, ignore_errors=True)
    return BuildResult(place.path, parsed.hash, read_verdict(place.verdict), timings.seconds, timings.peak_bytes)


def plan(recipe: Recipe | Path | str, device: str = "cpu", progress: Progress | None = None) -> Plan:
    """Predict time, memory and disk of a build, and check the recipe, without making anything.

    Needs the base model's config.json only. Sample counts come from the recipe's limits, and from its data where it
    sets none. Raises what `build` raises for a recipe that cannot be done.
    """
    parsed = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    return Plan(
        parsed.hash,
        parsed.base,
        {expert.name: expert.checkpoint or f"{expert.method} {expert.scheme}" for expert in parsed.experts},
        TASKS[parsed.task].predict(parsed, device, progress or Silent()),
    )


def evaluate(
    folder: Path | str, *, runtime: str | None = None, device: str = "cpu", progress: Progress | None = None
) -> Verdict:
    """Judge a complete mixture again and write verdict, report and card anew.

    runtime: one that is compared with the reference on the test samples first; the report then has that beside the
    verdict, and `agreement.json` the numbers. Losses are those of the recipe's runtime all the same.

    Needs the base model and the recipe's data, and checks that they are the ones the mixture was built from. Losses
    are measured again where `losses.parquet` is missing.
    Raises CheckpointError for a folder that holds no complete mixture, RecipeChanged when base or data are others,
    MoqeError for a runtime that cannot be compared.
    """
    place, shown = MixtureFolder(Path(folder)), progress or Silent()
    manifest = read_manifest(place)
    with locked(place.path):
        recipe = load_recipe(place.recipe)
        task = TASKS[recipe.task](recipe, place.path, device)
        _compare_identity(place, task.identity(shown), manifest["identity"])
        verify_mixture(place, manifest, shown)
        if not measured(task, place):
            score(task, recipe, place, ROUTER_SPLITS, shown)
        if runtime is not None:
            measure_agreement(task, place, runtime, device, shown)
        judge_mixture(task, recipe, place, shown)
        shutil.rmtree(place.work, ignore_errors=True)
    return read_verdict(place.verdict)


def _refuse_other_work(place: MixtureFolder, recipe: Recipe) -> None:
    """Raise RecipeChanged when the folder is another recipe's, or holds something else altogether."""
    if place.recipe.exists():
        found = load_recipe(place.recipe)
        if found.hash != recipe.hash:
            changed = ", ".join(_differences(found, recipe))
            raise RecipeChanged(
                f"{place.path} holds work of another recipe ({found.hash}, now {recipe.hash}; changed: {changed}): "
                "choose another folder, or delete this one"
            )
        return
    strangers = [
        path.name for path in place.path.iterdir() if path != place.work and not path.name.endswith(".partial")
    ]
    if strangers:
        raise RecipeChanged(f"{place.path} holds other files ({strangers[0]}, ...): choose an empty or new folder")


def _differences(old: Recipe, new: Recipe) -> list[str]:
    before, after = old.model_dump(mode="json"), new.model_dump(mode="json")
    return [key for key in after if before[key] != after[key]]


def _check_identity(place: MixtureFolder, identity: Mapping[str, str]) -> None:
    """Note what a build works on, or compare with what it began with."""
    path = place.work / "identity.json"
    if path.exists():
        _compare_identity(place, identity, read_json(path))
    else:
        write_json(path, dict(identity))


def _producers(device: str) -> dict[str, str]:
    """What computes: a half-built folder must not be finished by something else.

    Threads are named because another number adds floats in another order, which changes last bits.
    """
    return {
        "moqe": __version__,
        "torch": torch.__version__,
        "device": torch.device(device).type,
        "torch threads (OMP_NUM_THREADS)": str(torch.get_num_threads()),
    }


def _compare_identity(place: MixtureFolder, now: Mapping[str, str], before: Mapping[str, str]) -> None:
    changed = [f"{name}: {old} then, {now.get(name)} now" for name, old in before.items() if now.get(name) != old]
    if changed:
        raise RecipeChanged(
            f"{place.path} was begun with other inputs than are there now ({'; '.join(changed)}): "
            "bring them back, or delete the folder and build again"
        )


def _finish(place: MixtureFolder, recipe: Recipe, task: Task, identity: Mapping[str, str], progress: Progress) -> None:
    """Write the manifest, which makes the folder a mixture, and drop the state of the build."""
    folders = [place.shared, *(place.expert(expert.name) for expert in recipe.experts)]
    files = [path for folder in folders for path in sorted(folder.iterdir()) if path.is_file()]
    digests: dict[Path, dict[str, str]] = {folder: {} for folder in folders}
    for path, digest in zip(files, digest_files(files, "digest files", progress), strict=True):
        digests[path.parent][path.name] = digest
    experts = {
        expert.name: {
            "method": expert.method or "checkpoint",
            "scheme": expert.scheme,
            "files": digests[place.expert(expert.name)],
        }
        for expert in recipe.experts
    }
    manifest = {
        "format_version": FORMAT_VERSION,
        "recipe": recipe.hash,
        "task": recipe.task,
        "metric": task.metric,
        "runtime": task.runtime_name,
        "protocols": list(task.protocols),
        "identity": dict(identity),
        "experts": experts,
        "shared": digests[place.shared],
    }
    write_json(place.manifest, manifest)
