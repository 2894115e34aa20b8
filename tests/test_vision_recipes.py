"""The paper's image recipes: each parses and asks for what Table 1 has."""

from __future__ import annotations

from pathlib import Path

import pytest

import moqe

RECIPES = sorted((Path(__file__).parents[1] / "recipes" / "vision").glob("*.yaml"))
BASES = {
    "resnet50": "microsoft/resnet-50",
    "resnet101": "microsoft/resnet-101",
    "mobilenet_v2": "google/mobilenet_v2_1.0_224",
}


def test_the_whole_table_is_there() -> None:
    assert {path.stem for path in RECIPES} == {f"table1-{model}-{bits}" for model in BASES for bits in ("int8", "int4")}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_is_whole(path: Path) -> None:
    recipe = moqe.load_recipe(path)
    _, model, bits = path.stem.split("-")
    assert recipe.base == BASES[model]
    assert recipe.task == "image-classification"
    assert [expert.method for expert in recipe.experts] == ["brecq", "qat", "n2uq", "dsconv"]
    assert {expert.scheme for expert in recipe.experts} == {{"int8": "w8a8", "int4": "w4a4"}[bits]}
    assert (recipe.router.preset, recipe.router.feature, recipe.router.policy) == ("paper", "stem", "route")
    assert f"moqe build recipes/vision/{path.name} " in path.read_text()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_router_and_test_images_do_not_overlap(path: Path) -> None:
    data = moqe.load_recipe(path).data
    (router,), (test,), (calibration,) = data.router, data.test, data.calibration
    assert (router.split, test.split, calibration.split) == ("validation", "validation", "train")
    assert router.skip_documents + (router.max_documents or 50_000) <= test.skip_documents
