"""The whole pipeline on images: build, judge, load, route, classify; the same bytes every time, also after a stop."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import moqe
from moqe.bundled.digits import digits_images
from moqe.errors import MoqeError, RecipeError
from moqe.evaluate import read_losses, read_predictions
from moqe.evaluate.verdict import read_verdict
from moqe.folder import MixtureFolder
from moqe.router import Cascade, VectorFeatures, load_router
from moqe.router.baselines import Constant
from moqe.router.network_router import NetworkRouter
from moqe.router.onnx_network import OnnxNetwork
from moqe.router.saved import save_router
from moqe.runtimes.images import IMAGE_RUNTIMES
from moqe.runtimes.texts import TEXT_RUNTIMES
from moqe.tasks.image_expert_files import expert_file
from moqe.tasks.images import ImageTask


def recipe_for_digits() -> dict[str, Any]:
    """Four experts of the bundled classifier, as the mapping a YAML file would hold."""
    return {
        "base": "bundled:digits-resnet",
        "task": "image-classification",
        "data": {
            "calibration": ["bundled:digits/train"],
            "router": ["bundled:digits/router"],
            "test": ["bundled:digits/test"],
            "calibration_samples": 40,
            "router_samples": 80,
            "test_samples": 100,
        },
        "experts": [
            {"name": "ptq8", "method": "ptq", "scheme": "w8a8"},
            {"name": "ptq4", "method": "ptq", "scheme": "w4a4"},
            {"name": "qat4", "method": "qat", "scheme": "w4a4", "qat": {"steps": 3, "batch_size": 8}},
            {"name": "blocks", "method": "dsconv", "scheme": "w4a4"},
        ],
        "router": {"epochs": 1, "policy": "cascade", "max_cost": 1.5},
        "bootstrap_samples": 100,
    }


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture of the bundled classifier. Tests must leave it as it is."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("images") / "m"
    moqe.build(moqe.parse_recipe(recipe_for_digits()), folder)
    return folder


def tree(folder: Path) -> dict[str, str]:
    """Digest of every file under a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def first_image(part: str) -> bytes:
    """An encoded digit."""
    return digits_images(part)[0][1]


def test_the_folder_is_whole_and_holds_one_file_an_expert(digits: Path) -> None:
    for expert in ("ptq8", "ptq4", "qat4", "blocks"):
        assert {path.name for path in (digits / "experts" / expert).iterdir()} == {"model.onnx", "certificate.json"}
    assert {path.name for path in (digits / "shared").iterdir()} == {"images.json", "stem.onnx"}
    assert not (digits / ".work").exists()


def test_the_verdict_speaks_of_accuracy(digits: Path) -> None:
    verdict = json.loads((digits / "verdict.json").read_text())
    assert verdict["metric"] == "top1"
    found = verdict["protocols"]["whole"]
    assert found["oracle"] >= max(found["experts"].values())
    assert 1.0 <= found["mixture"]["cost"] <= 2.0
    assert found["policy"] == "cascade"
    assert set(found["policies"]) == {"route", "cascade"}


def test_losses_and_predictions_agree(digits: Path) -> None:
    place = MixtureFolder(digits)
    predictions = read_predictions(place.predictions, "test")
    assert predictions is not None
    right = read_losses(place.losses, "test", "whole", "top1")
    nats = read_losses(place.losses, "test", "whole", "cross_entropy")
    answers = predictions.log_probabilities.astype(np.float64)
    assert np.array_equal(answers.argmax(2) == predictions.label[:, None], right.loss == 1)
    own = np.take_along_axis(answers, predictions.label[:, None, None], 2)[:, :, 0]
    assert np.allclose(-own, nats.loss, rtol=2e-3, atol=2e-3)


def test_certificates_compare_with_ptq(digits: Path) -> None:
    made = json.loads((digits / "experts" / "qat4" / "certificate.json").read_text())
    plain = json.loads((digits / "experts" / "ptq4" / "certificate.json").read_text())
    assert made["layers"]
    for ours, theirs in zip(made["layers"], plain["layers"], strict=True):
        assert ours["seen"] == 40
        assert ours["baseline_error"] == pytest.approx(theirs["error"], rel=1e-3)
    assert plain["error"] == plain["baseline_error"]


def test_two_builds_give_the_same_bytes_also_after_a_stop(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = MoqeError("stopped for the test")

    def stop(*_: object) -> None:
        raise stopped

    recipe = moqe.parse_recipe(recipe_for_digits())
    with monkeypatch.context() as patch:
        patch.setattr(importlib.import_module("moqe.build"), "train_routers", stop)
        with pytest.raises(MoqeError, match="stopped"):
            moqe.build(recipe, tmp_path / "m")
    (tmp_path / "m" / "experts" / "qat4" / "certificate.json").unlink()  # as if it had been killed there
    moqe.build(recipe, tmp_path / "m")
    assert tree(tmp_path / "m") == tree(digits)


def test_evaluating_again_changes_nothing(digits: Path) -> None:
    before = tree(digits)
    moqe.evaluate(digits)
    assert tree(digits) == before


def test_an_expert_answers_as_its_losses_say(digits: Path) -> None:
    mixture, task = moqe.load(digits), ImageTask(moqe.parse_recipe(recipe_for_digits()), digits)
    samples = task.splits()["test"]
    stored = read_predictions(MixtureFolder(digits).predictions, "test")
    assert stored is not None
    for column, expert in enumerate(stored.experts):
        found = mixture.classify(samples.store.documents[int(samples.rows[0])].content(), expert=expert)
        assert found.index == int(stored.log_probabilities[0, column].argmax())
        assert found.probability == pytest.approx(float(np.exp(stored.log_probabilities[0, column].max())), rel=0.05)
        assert found.reason == "pinned"


def test_the_mixture_asks_as_its_cascade_says(digits: Path) -> None:
    mixture = moqe.load(digits)
    answers = [mixture.classify(content) for _, content, _ in digits_images("test")[:30]]
    assert all(answer.cost == 1.0 + (answer.second is not None) for answer in answers)
    assert all(sum(answer.top.values()) <= 1.0 + 1e-5 for answer in answers)
    assert all(answer.second != answer.expert for answer in answers)


def test_a_deployed_mixture_answers_as_judged(digits: Path) -> None:
    mixture, task = moqe.load(digits), ImageTask(moqe.parse_recipe(recipe_for_digits()), digits)
    samples = task.splits()["test"]
    answers = [mixture.classify(samples.store.documents[int(row)].content()) for row in samples.rows]
    (found,) = read_verdict(MixtureFolder(digits).verdict).protocols.values()
    assert np.mean([answer.cost for answer in answers]) == pytest.approx(found.mixture.cost, abs=0.03)
    for name in mixture.experts:
        asked = np.mean([answer.expert == name for answer in answers])
        assert asked == pytest.approx(found.mixture.share[name], abs=0.03)
    stored = read_predictions(MixtureFolder(digits).predictions, "test")
    assert stored is not None
    right = np.mean([answer.index == label for answer, label in zip(answers, stored.label, strict=True)])
    assert right == pytest.approx(found.mixture.value, abs=0.03)


@pytest.mark.parametrize("position", range(4))
def test_costs_are_the_recipes_experts(position: int, digits: Path, tmp_path: Path) -> None:
    names = [expert["name"] for expert in recipe_for_digits()["experts"]]
    assert names != sorted(names)
    shutil.copytree(digits, tmp_path / "m")
    place = MixtureFolder(tmp_path / "m").router("whole") / "mixture"
    costs = torch.tensor([float(abs(position - other)) for other in range(4)])
    for name in ("router.json", "router.safetensors"):
        (place / name).unlink()
    save_router(Constant(costs), place)
    assert moqe.load(tmp_path / "m").route(first_image("test")).expert == names[position]


def test_the_router_sees_in_the_folder_what_it_saw_in_training(digits: Path) -> None:
    mixture, task = moqe.load(digits), ImageTask(moqe.parse_recipe(recipe_for_digits()), digits)
    seen: list[torch.Tensor] = []
    mixture._decide = lambda features, protocol, said: seen.append(features.pooled())  # type: ignore[method-assign]
    samples = task.splits()["test"]
    mixture.route(samples.store.documents[int(samples.rows[3])].content())
    assert torch.allclose(seen[0][0], task.features("test", "whole").pooled()[3], atol=1e-4)


def test_features_of_an_expert_are_counted_and_used(tmp_path: Path) -> None:
    content = recipe_for_digits()
    content["experts"] = content["experts"][:2]
    content["router"] = {"epochs": 1, "feature": "backbone", "loss": "zero_one", "guard": False, "preset": "paper"}
    moqe.build(moqe.parse_recipe(content), tmp_path / "m")
    found = json.loads((tmp_path / "m" / "verdict.json").read_text())["protocols"]["whole"]
    paper = found["routers"]["paper"]
    assert paper["cost"] == pytest.approx(1.0 + paper["share"]["ptq4"])  # ptq8 always runs
    assert set(found["policies"]) == {"route", "cascade"}  # compared with, whichever is deployed
    mixture = moqe.load(tmp_path / "m")
    answer = mixture.classify(first_image("test"))
    assert answer.cost == 1.0 + (answer.expert == "ptq4")

    saved = load_router(tmp_path / "m" / "router" / "whole" / "mixture")
    assert isinstance(saved, NetworkRouter)
    features = VectorFeatures(torch.randn(5, saved.network.options["dimension"]))
    deployed = mixture._open_router(tmp_path / "m" / "router" / "whole" / "mixture")
    assert torch.allclose(deployed.predict(features), saved.predict(features), atol=1e-5)
    assert isinstance(deployed, NetworkRouter)
    assert isinstance(deployed.network, OnnxNetwork)

    # What looks at no image is not counted as having looked at one.
    place = tmp_path / "m" / "router" / "whole" / "mixture"
    shutil.rmtree(place)
    save_router(Constant(torch.tensor([1.0, 0.0])), place)
    moqe.evaluate(tmp_path / "m")
    judged = json.loads((tmp_path / "m" / "verdict.json").read_text())["protocols"]["whole"]["mixture"]
    answer = moqe.load(tmp_path / "m").classify(first_image("test"))
    assert (answer.expert, answer.cost, judged["cost"]) == ("ptq4", 1.0, 1.0)
    save_router(saved, place)
    always = moqe.load(tmp_path / "m")
    always.__dict__["_cascade"] = Cascade(0.0, (1, 0), 1)
    answer = always.classify(first_image("test"))
    assert (answer.expert, answer.second, answer.cost) == ("ptq4", None, 1.0)


def test_classes_of_the_same_name_are_told_apart(digits: Path) -> None:
    mixture: Any = moqe.load(digits)
    mixture._shared = dataclasses.replace(mixture._shared, classes=("crane", "dog", "crane"))
    found = mixture._classification(torch.tensor([[0.7, 0.2, 0.1]]), "ptq8", None, 1.0, "")
    assert (found.label, found.index) == ("crane", 0)
    assert found.top == pytest.approx({"crane (0)": 0.7, "dog": 0.2, "crane (2)": 0.1})


def test_a_route_needs_no_images_for_a_cascade(tmp_path: Path) -> None:
    content = recipe_for_digits()
    content["experts"] = content["experts"][:2]
    content["data"] |= {"router_samples": 32, "test_samples": 20}  # eight of them for validation
    content["router"] = {"epochs": 1, "preset": "paper"}
    moqe.build(moqe.parse_recipe(content), tmp_path / "m")
    found = json.loads((tmp_path / "m" / "verdict.json").read_text())["protocols"]["whole"]
    assert (found["policy"], found["policies"]) == ("route", {})
    assert moqe.load(tmp_path / "m").classify(first_image("test")).cost == 1.0


def test_onnx_runtime_scores_a_table_of_its_own(tmp_path: Path, digits: Path) -> None:
    content = recipe_for_digits()
    content["experts"], content["runtime"] = content["experts"][:2], "onnx"
    moqe.build(moqe.parse_recipe(content), tmp_path / "m")
    ours = read_losses(MixtureFolder(tmp_path / "m").losses, "test", "whole", "cross_entropy")
    reference = read_losses(MixtureFolder(digits).losses, "test", "whole", "cross_entropy")
    assert (ours.runtime, reference.runtime) == ("onnx", "reference")
    assert np.allclose(ours.base, reference.base, atol=1e-4)
    assert np.abs(ours.loss - reference.loss[:, :2]).mean() < 0.02
    assert not np.array_equal(ours.loss, reference.loss[:, :2])


def test_images_of_another_model_join_the_mixture(tmp_path: Path) -> None:
    content = recipe_for_digits()
    content["experts"] = [
        {"name": "own", "method": "ptq", "scheme": "w8a8"},
        {"name": "other", "method": "ptq", "scheme": "w4a4", "base": "bundled:digits-resnet"},
    ]
    task = ImageTask(moqe.parse_recipe(content), tmp_path)
    assert set(task.identity(moqe.build.__globals__["Silent"]())) >= {"base", "base.other", "samples.test"}


def test_a_dry_run_says_what_a_build_takes(digits: Path) -> None:
    found = moqe.plan(moqe.parse_recipe(recipe_for_digits())).estimate
    for name, predicted in found.expert_bytes.items():
        actual = expert_file(digits / "experts" / name).stat().st_size
        assert predicted / 4 < actual < 1.1 * predicted
    assert set(found.seconds) == {"quantize", "score"}
    assert found.total_seconds > 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"method": "qatt"}, r"unknown method 'qatt'; did you mean 'qat'"),
        ({"method": "gptq"}, r"unknown method 'gptq'"),
        ({"scheme": "w4a16"}, r"unknown scheme 'w4a16' for images"),
        ({"brecq": {"steps": 5}}, r"options of brecq have no effect on qat"),
    ],
)
def test_experts_that_cannot_be_made(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    content = recipe_for_digits()
    content["experts"][2] |= change
    with pytest.raises(RecipeError, match=said):
        moqe.build(moqe.parse_recipe(content), tmp_path / "m")
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("task", ["language", "image-classification"])
def test_keys_that_only_the_other_task_reads_are_refused(task: str, recipe_content: dict[str, Any]) -> None:
    content, foreign = (
        (recipe_content, {"weights": "x.safetensors"})
        if task == "language"
        else (recipe_for_digits(), {"protocol": {"route_on": "whole"}})
    )
    with pytest.raises(RecipeError, match=rf"{next(iter(foreign))} has no effect where task is {task}"):
        moqe.parse_recipe(content | foreign)


def test_every_runtime_of_the_recipe_exists() -> None:
    wanted = moqe.Recipe.model_fields["runtime"].annotation.__args__  # type: ignore[union-attr]
    assert set(wanted) == {*IMAGE_RUNTIMES, *TEXT_RUNTIMES}


def test_verbs_of_the_other_task_are_refused(digits: Path, built: Path) -> None:
    with pytest.raises(MoqeError, match="for image-classification: it has no generate"):
        moqe.load(digits).generate("the river")
    with pytest.raises(MoqeError, match="for language: it has no classify"):
        moqe.load(built).classify("three.png")
