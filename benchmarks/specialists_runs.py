"""What runs of `benchmarks.specialists` keep for the tables, and what a run takes over from others.

Kept is a small file a run, `<kind>/seed-<n>.json`: what every way of choosing scored on each test window. Tables are
written from these alone, so seeds may be run on different days and machines, and anybody can compute the intervals
again without a model.

Taken over are files of another run in the same folder, by link: the losses of the base where the windows are the same,
and codes, training, experts and their losses where whatever decides about each of them is the same as well.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.specialists_tables import GENERALIST, Outcomes
from moqe.evaluate import BASE
from moqe.folder import MixtureFolder
from moqe.recipe import Expert, Recipe
from moqe.store import canonical_hash, canonical_json, link, read_json, write_json, write_text

KEPT = Path("docs/measurements/specialists")
RECIPE, SCORES = "recipe.json", Path("scores") / "parts"
CODES, TRAINED = "codes", "trained"  # stages of an expert
_DIGITS = 6  # of a window's several hundred nats: a hundred-thousandth of a nat per token


def keep(folder: Path, kept: Path, kind: str, conditions: dict[str, Any]) -> None:
    """Write the outcomes of the run in `folder` to `kept`, with the options it was made with."""
    found: Outcomes = read_json(folder / "outcomes.json")
    for name in ("memory", "held-out", "prompts"):
        if (folder / f"{name}.json").exists():
            found[name] = read_json(folder / f"{name}.json")
    path = kept / kind / f"seed-{found['seed']}.json"
    write_text(path, canonical_json(_rounded(found | {"conditions": conditions})) + "\n")


def read_kept(kept: Path) -> dict[str, list[Outcomes]]:
    """All runs by kind, such as `4-codes`, in the order of their seeds."""
    places = sorted(place for place in kept.glob("[234]-*") if place.is_dir())
    found = {place.name: [read_json(path) for path in sorted(place.glob("seed-*.json"))] for place in places}
    return {kind: runs for kind, runs in found.items() if runs}


def take_over(recipe: Recipe, folder: Path, work: Path) -> list[str]:
    """Link into `folder` what other runs in `work` have made that `recipe` would make again; what that is, in words."""
    write_json(folder / RECIPE, {"recipe": recipe.model_dump(mode="json"), "facts": _facts(recipe)})
    found = []
    for other in sorted(path.parent for path in work.glob(f"*/*/{RECIPE}")):
        facts, ours = read_json(other / RECIPE)["facts"], _facts(recipe)
        if other == folder or facts["samples"] != ours["samples"]:
            continue
        found += [f"losses of {BASE}"] if _link_scores(other, folder, BASE) else []
        for expert in recipe.experts:
            names = {stage: f"{expert.name}, {stage}" for stage in (CODES, TRAINED)}
            same = {s for s, name in names.items() if facts["experts"].get(name) == ours["experts"][name]}
            found += _take_expert(expert, same, other, folder)
    return found


def _take_expert(expert: Expert, same: set[str], other: Path, folder: Path) -> list[str]:
    """What of an expert that is the same in both runs was linked. same: stages that are."""
    here, there, found = MixtureFolder(folder), MixtureFolder(other), list[str]()
    stages = {
        Path("records") / expert.name: CODES,
        Path("quantized") / expert.name: CODES,
        Path("distill") / expert.name / "round-0": TRAINED,
    }
    places = [place for place, stage in stages.items() if stage in same]
    found += [f"{name.parts[0]} of {expert.name}" for name in places if _link_all(there.work / name, here.work / name)]
    # What was trained may have been changed after the first round, and some scales left out: that is made here.
    whole = there.certificate(expert.name).exists() and (CODES if expert.distill is None else TRAINED) in same
    if whole and expert.distill is None:
        _link_all(there.expert(expert.name), here.expert(expert.name))
        found += [expert.name]
        _link_all(there.shared, here.shared)
    if whole and (expert.distill is None or expert.name == GENERALIST):
        found += [f"losses of {expert.name}"] if _link_scores(other, folder, expert.name) else []
    return found


def _facts(recipe: Recipe) -> dict[str, Any]:
    """What decides about windows and about each stage of each expert, as digests.

    Codes do not depend on whether windows are told apart by domain or by cluster, but for the order of sums, unless
    statistics weigh them; training does, which takes turns among them.
    """
    samples = recipe.model_dump(mode="json", include={"base", "data", "runtime", "seed", "protocol"})
    by = "domain"
    if recipe.specialists is not None and recipe.specialists.by == "cluster":
        by = f"cluster of {recipe.specialists.count}"
    experts = {}
    for expert in recipe.experts:
        content, windows = expert.model_dump(mode="json"), recipe.calibration_windows
        codes = {key: value for key, value in content.items() if key != "distill"}
        experts[f"{expert.name}, {CODES}"] = canonical_hash([codes, by if expert.calibration else "", windows])
        experts[f"{expert.name}, {TRAINED}"] = canonical_hash([content, by, windows])
    return {"samples": canonical_hash(samples), "experts": experts}


def _link_scores(other: Path, folder: Path, name: str) -> bool:
    parts = [
        path
        for split in ("router_train", "router_validation", "test")
        for path in (other / SCORES).glob(f"{name}-{split}-*.parquet")
    ]
    for path in parts:
        link(path, folder / SCORES / path.name)
    return bool(parts)


def _link_all(source: Path, target: Path) -> bool:
    if not source.is_dir() or target.exists():
        return False
    for path in source.rglob("*"):
        if path.is_file():
            link(path, target / path.relative_to(source))
    return True


def _rounded(value: Any) -> Any:
    """The same with numbers of a few digits."""
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}")
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    return [_rounded(entry) for entry in value] if isinstance(value, list) else value
