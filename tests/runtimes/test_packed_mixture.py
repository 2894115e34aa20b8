"""A mixture whose experts run packed: loaded, routed, scored, and as the runtime of a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import moqe
from moqe.evaluate import read_losses
from moqe.mixture.language import LanguageMixture
from moqe.runtimes.packed.runtime import PackedRuntime
from moqe.runtimes.texts import TEXT_RUNTIMES
from moqe.store import read_json
from moqe.tasks.language import LanguageTask

TEXT = "def return self for in range print the river house"


def opened(folder: Path, runtime: str) -> LanguageMixture:
    mixture = moqe.load(folder, runtime=runtime)
    assert isinstance(mixture, LanguageMixture)
    return mixture


def test_every_expert_of_a_mixture_runs_packed(built: Path) -> None:
    reference, exact, rough = (opened(built, name) for name in ("reference", "packed-float32", "packed"))
    for name in reference.experts:
        expected = reference.score(TEXT, expert=name).nats
        rounded = reference.recipe.experts[reference.experts.index(name)].scheme == "w8a8"
        assert exact.score(TEXT, expert=name).nats == pytest.approx(expected, rel=1e-3 if rounded else 1e-5)
        assert rough.score(TEXT, expert=name).nats == pytest.approx(expected, rel=2e-2)
        assert rough.runtime(name).name == "packed"
    assert rough.route(TEXT) == reference.route(TEXT)
    assert exact.generate(TEXT, expert="gptq", max_new_tokens=6) == reference.generate(
        TEXT, expert="gptq", max_new_tokens=6
    )
    assert len(rough.generate(TEXT, max_new_tokens=6).token_ids) <= 6


def test_only_the_expert_that_answers_is_loaded(built: Path) -> None:
    mixture = opened(built, "packed")
    assert not mixture._runtimes
    mixture.generate(TEXT, expert="rtn", max_new_tokens=1)
    assert list(mixture._runtimes) == ["rtn"]
    runtimes = [mixture.runtime(name) for name in mixture.experts]
    assert [isinstance(runtime, PackedRuntime) and runtime._loaded is not None for runtime in runtimes] == [
        name == "rtn" for name in mixture.experts
    ]


def test_a_recipe_is_scored_packed(recipe_content: dict[str, Any], tmp_path: Path) -> None:
    content = recipe_content | {"runtime": "packed-float32", "experts": recipe_content["experts"][1:2]}
    moqe.build(moqe.parse_recipe(content), tmp_path)
    table = read_losses(tmp_path / "losses.parquet", "test", "whole", "nats_per_token")
    assert table.runtime == read_json(tmp_path / "mixture.json")["runtime"] == "packed-float32"
    task = LanguageTask(moqe.parse_recipe(content | {"runtime": "reference"}), tmp_path)
    for name, losses in (("rtn", table.loss[:, 0]), ("base", table.base)):
        expected = task.losses(name, "test", range(4)).losses["whole"]["nats_per_token"].loss_sum
        assert losses[:4] == pytest.approx(expected, rel=1e-5)


def test_a_runtime_that_there_is_not_is_named(built: Path) -> None:
    with pytest.raises(moqe.MoqeError, match="no runtime 'pakced' for texts; did you mean 'packed'"):
        moqe.load(built, runtime="pakced")


def test_recipes_know_the_runtimes_of_texts(recipe_content: dict[str, Any]) -> None:
    for runtime in TEXT_RUNTIMES:
        assert moqe.parse_recipe(recipe_content | {"runtime": runtime}).runtime == runtime
