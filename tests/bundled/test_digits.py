from __future__ import annotations

import io
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional

import moqe.bundled
from moqe.bundled import BundledClassifier, bundled_classifier, bundled_model, quickstart_recipe
from moqe.bundled.digits import LABELS, PARTS, digits_images, part_of
from moqe.errors import DataError, MissingExtra, ModelError, RecipeError
from moqe.store import disk_bytes, read_json


@pytest.fixture(scope="module")
def parts():
    return {part: digits_images(part) for part in PARTS}


@pytest.fixture(scope="module")
def classifier() -> BundledClassifier:
    return bundled_classifier("digits-resnet")


def decoded(rows) -> tuple[torch.Tensor, torch.Tensor]:
    image = pytest.importorskip("PIL.Image")
    pixels = [np.asarray(image.open(io.BytesIO(content)).convert("RGB")) for _, content, _ in rows]
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2), torch.tensor([label for _, _, label in rows])


def test_the_parts_are_fixed_disjoint_and_hold_all_images(parts):
    assert {part: len(rows) for part, rows in parts.items()} == {"train": 497, "router": 650, "test": 650}
    names = [name for rows in parts.values() for name, _, _ in rows]
    assert len(set(names)) == 1797
    assert len({content for rows in parts.values() for _, content, _ in rows}) == 1797
    assert [part_of(index) for index in (0, 496, 497, 498, 1796)] == ["train", "train", "router", "test", "test"]


def test_every_class_is_in_every_part(parts):
    for rows in parts.values():
        counts = np.bincount([label for _, _, label in rows], minlength=len(LABELS))
        assert counts.min() >= 40
        assert len(counts) == len(LABELS)


def test_an_image_library_opens_them_as_scikit_learn_has_them(parts):
    datasets = pytest.importorskip("sklearn.datasets")
    pixels, labels = decoded(parts["train"])
    content = datasets.load_digits()
    assert pixels.shape == (497, 3, 8, 8)
    assert int(pixels.max()) == 255
    expected = np.broadcast_to((content.images[:497] * 255 / 16).round()[:, None], (497, 3, 8, 8))
    assert np.array_equal(pixels.numpy(), expected)
    assert labels.tolist() == content.target[:497].tolist()


def test_an_unknown_part_and_a_missing_library(monkeypatch):
    with pytest.raises(DataError, match="no part 'tests'; did you mean 'test'"):
        digits_images("tests")
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingExtra, match=r"needs scikit-learn.*pip install '\.\[vision\]'"):
        digits_images("test")


def test_the_shipped_network_is_as_good_as_its_facts_say(parts, classifier):
    network = classifier.factory().eval()
    network.load_state_dict(load_file(classifier.weights))
    facts = read_json(classifier.weights.parent / "training.json")
    assert facts["parameters"] == sum(p.numel() for p in network.parameters()) <= 100_000
    mean, std = (
        torch.tensor(value)[:, None, None] for value in (classifier.preprocessing.mean, classifier.preprocessing.std)
    )
    for part, rows in parts.items():
        pixels, labels = decoded(rows)
        with torch.inference_mode():
            logits = network((pixels / 255 - mean) / std)
        measured = {
            "images": len(rows),
            "top1": float((logits.argmax(1) == labels).double().mean()),
            "cross_entropy": float(functional.cross_entropy(logits, labels)),
        }
        assert measured == pytest.approx(facts["parts"][part], abs=2e-4)
    assert facts["parts"]["test"]["top1"] > 0.95


def test_labels_and_size(classifier):
    assert classifier.labels == tuple("0123456789")
    assert disk_bytes(classifier.weights.parent) <= 400 * 2**10


def test_an_unknown_name_and_the_other_task():
    with pytest.raises(
        RecipeError, match="unknown bundled image classifier 'digit-resnet'; did you mean 'digits-resnet'"
    ):
        bundled_classifier("digit-resnet")
    with pytest.raises(RecipeError, match="language model: set task: language"):
        bundled_classifier("tiny-qwen3")
    with pytest.raises(RecipeError, match="classifies images: set task: image-classification"):
        bundled_model("digits-resnet")


def test_a_damaged_file_is_found(tmp_path, monkeypatch, classifier):
    copy = tmp_path / "digits-resnet"
    copy.mkdir()
    for file in classifier.weights.parent.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr(moqe.bundled, "__file__", str(tmp_path / "__init__.py"))
    assert bundled_classifier("digits-resnet").weights == copy / "model.safetensors"
    with (copy / "model.safetensors").open("r+b") as handle:
        handle.truncate(1000)
    with pytest.raises(ModelError, match=r"model\.safetensors is missing or damaged"):
        bundled_classifier("digits-resnet")


def test_quickstart_has_a_recipe_for_each_task():
    images = quickstart_recipe("image-classification")
    assert images.base == "bundled:digits-resnet"
    assert {expert.scheme for expert in images.experts} == {"w4a4"}
    assert quickstart_recipe().task == "language"
    with pytest.raises(RecipeError, match="unknown task 'image-classificaton'; did you mean 'image-classification'"):
        quickstart_recipe("image-classificaton")
