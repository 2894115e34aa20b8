"""The whole pipeline on a tiny model: build, judge, load, route, generate; and the same bytes every time."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

import moqe
from moqe.errors import CheckpointError, FolderBusy, RecipeChanged
from moqe.store import locked


def tree(folder: Path) -> dict[str, str]:
    """Digest of every file under a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_folder_holds_what_the_layout_says(built: Path) -> None:
    names = {path.name for path in built.iterdir()}
    assert names == {
        "README.md", "experts", "losses.parquet", "mixture.json", "recipe.yaml", "report.html", "router", "shared",
        "verdict.json",
    }  # fmt: skip
    for expert in ("gptq", "rtn", "smooth", "kq"):
        assert (built / "experts" / expert / "certificate.json").exists()


def test_shared_tensors_are_stored_once(built: Path) -> None:
    shards = [built / "experts" / name / "model-00001-of-00003.safetensors" for name in ("gptq", "rtn", "smooth")]
    assert len({shard.stat().st_ino for shard in (*shards, built / "shared" / "model-shared.safetensors")}) == 1


def test_verdict_has_the_documented_keys(built: Path) -> None:
    verdict = json.loads((built / "verdict.json").read_text())
    manifest = json.loads((built / "mixture.json").read_text())
    assert verdict["recipe"] == manifest["recipe"]
    assert verdict["metric"] == "nats_per_token"
    assert set(verdict["protocols"]) == {"whole", "prefix-16"}
    for found in verdict["protocols"].values():
        assert {"base", "experts", "best_single", "mixture", "difference", "oracle", "split_half_oracle"} <= set(found)
        assert set(found["mixture"]["share"]) == set(found["experts"]) == {"gptq", "rtn", "smooth", "kq"}
        assert found["oracle"] <= min(found["experts"].values()) <= found["random"]
        expected = found["mixture"]["value"] - found["experts"][found["best_single"]]
        assert found["difference"]["value"] == pytest.approx(expected, abs=1e-9)


def test_a_loaded_mixture_routes_scores_and_generates(built: Path) -> None:
    mixture = moqe.load(built)
    decision = mixture.route("the old river walked into the house")
    assert decision.expert == min(decision.costs, key=lambda name: decision.costs[name])
    pinned = {name: mixture.score("one two three four", expert=name).nats for name in mixture.experts}
    routed = mixture.score("one two three four")
    assert routed.nats == pinned[routed.expert]
    first = mixture.generate("def return", max_new_tokens=4)
    assert first.token_ids == mixture.generate("def return", max_new_tokens=4).token_ids
    assert len(first.token_ids) <= 4


def test_building_again_changes_nothing_and_evaluating_gives_the_same_bytes(
    built: Path, recipe_content: dict[str, Any]
) -> None:
    before = tree(built)
    moqe.build(moqe.parse_recipe(recipe_content), built)
    assert tree(built) == before
    moqe.evaluate(built)
    assert tree(built) == before


def test_two_builds_give_the_same_bytes(built: Path, tmp_path: Path, recipe_content: dict[str, Any]) -> None:
    moqe.build(moqe.parse_recipe(recipe_content), tmp_path / "again")
    assert tree(tmp_path / "again") == tree(built)


def test_another_recipe_in_the_same_folder_is_refused(built: Path, recipe_content: dict[str, Any]) -> None:
    recipe_content["seed"] = 7
    with pytest.raises(RecipeChanged, match=r"another recipe .*changed: seed"):
        moqe.build(moqe.parse_recipe(recipe_content), built)


def test_two_builds_in_one_folder_are_refused(tmp_path: Path, recipe_content: dict[str, Any]) -> None:
    with locked(tmp_path), pytest.raises(FolderBusy, match="another process is building"):
        moqe.build(moqe.parse_recipe(recipe_content), tmp_path)


def test_a_half_built_folder_does_not_load(tmp_path: Path, built: Path) -> None:
    (tmp_path / "recipe.yaml").write_text((built / "recipe.yaml").read_text())
    with pytest.raises(CheckpointError, match="half-built"):
        moqe.load(tmp_path)
    with pytest.raises(CheckpointError, match="no mixture"):
        moqe.load(tmp_path / "nowhere")
