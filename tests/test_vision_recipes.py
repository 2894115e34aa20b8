"""The paper's image recipes: each asks for what Table 1 has, and builds on random models of those shapes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import moqe

RECIPES = sorted((Path(__file__).parents[1] / "recipes" / "vision").glob("*.yaml"))
BASES = {
    "resnet50": "microsoft/resnet-50",
    "resnet101": "microsoft/resnet-101",
    "mobilenet_v2": "google/mobilenet_v2_1.0_224",
}
PARAMETERS = {  # without the 1000 classes' head and the batch norms, which are folded
    "microsoft/resnet-50": 23.5e6,
    "microsoft/resnet-101": 42.4e6,
    "google/mobilenet_v2_1.0_224": 2.2e6,
}
CLASSES = ("cat", "dog", "house", "tree")
SIDE = 64


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


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Randomly initialised models of the recipes' shapes with four classes, for images of 64 pixels, by hub id."""
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification, ResNetConfig
    from transformers import ResNetForImageClassification as ResNet

    torch.manual_seed(0)
    names = {"id2label": dict(enumerate(CLASSES)), "label2id": {name: i for i, name in enumerate(CLASSES)}}
    models = {
        "microsoft/resnet-50": ResNet(ResNetConfig(depths=[3, 4, 6, 3], **names)),
        "microsoft/resnet-101": ResNet(ResNetConfig(depths=[3, 4, 23, 3], **names)),
        "google/mobilenet_v2_1.0_224": MobileNetV2ForImageClassification(MobileNetV2Config(**names)),
    }
    processor = {
        "image_processor_type": "ConvNextImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": SIDE},
        "crop_pct": 1.0,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "resample": 3,
    }
    folders = {}
    for base, model in models.items():
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = None
                if name.endswith("layer.2.normalization"):  # small residuals: a deep random network is chaotic
                    torch.nn.init.constant_(module.weight, 0.2)
        with torch.no_grad():  # batch norms that know their inputs; else activations vanish or explode
            model.train()(torch.randn(8, 3, SIDE, SIDE))
        model.eval()
        folder = tmp_path_factory.mktemp(base.rpartition("/")[2])
        model.save_pretrained(folder)
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
        folders[base] = folder
    return folders


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Generated images in ImageNet's layout: `<part>/<class>/<file>`."""
    folder = tmp_path_factory.mktemp("imagenet")
    random = np.random.default_rng(0)
    for part, number in (("calibration", 2), ("router", 20), ("test", 10)):
        for name in CLASSES:
            (folder / part / name).mkdir(parents=True)
            for i in range(number):
                pixels = random.integers(0, 256, (SIDE, SIDE + 8, 3), np.uint8)
                Image.fromarray(pixels).save(folder / part / name / f"{i}.JPEG")
    return folder


def small(path: Path, bases: dict[str, Path], pictures: Path) -> moqe.Recipe:
    """A recipe of the table on a random model and generated images, with as few updates as there can be."""
    content = yaml.safe_load(path.read_text())
    content["base"] = str(bases[content["base"]])
    for part in ("calibration", "router", "test"):
        content["data"][part] = [str(pictures / part)]
    for expert in content["experts"]:
        if expert["method"] == "dsconv":
            expert["dsconv"] = {"steps": 0}
        else:
            expert[expert["method"]] = {"steps": 3, "batch_size": 2}
    return moqe.parse_recipe(content | {"bootstrap_samples": 100})


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_dry_run_on_a_model_of_that_shape(path: Path, bases: dict[str, Path], pictures: Path) -> None:
    recipe = small(path, bases, pictures)
    found = moqe.plan(recipe).estimate
    assert found.parameters == pytest.approx(PARAMETERS[moqe.load_recipe(path).base], rel=0.02)
    bits = 8 if "int8" in path.stem else 4
    for size in found.expert_bytes.values():
        assert bits / 8 < size / found.parameters < 1.2 * bits / 8 + 0.3


def test_build_on_a_model_of_that_shape(bases: dict[str, Path], pictures: Path, tmp_path: Path) -> None:
    (path,) = [path for path in RECIPES if path.stem == "table1-resnet50-int4"]
    result = moqe.build(small(path, bases, pictures), tmp_path / "m")
    assert set(result.verdict.experts) == {"brecq", "qat", "n2uq", "dsconv"}
    answer = moqe.load(tmp_path / "m").classify(next((pictures / "test").rglob("*.JPEG")))
    assert answer.label in CLASSES
