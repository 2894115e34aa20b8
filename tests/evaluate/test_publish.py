from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from moqe.errors import CheckpointError
from moqe.evaluate.context import DistilledRow, MemoryPoint
from moqe.evaluate.loss_table import LossTable
from moqe.evaluate.metrics import METRICS
from moqe.evaluate.publish import gather, publish
from moqe.evaluate.verdict import ExpertSummary, ProtocolVerdict, Verdict
from moqe.folder import MixtureFolder
from moqe.recipe import Recipe, parse_recipe
from moqe.store import read_json, write_json

RECIPE = {
    "base": "somebody/model",
    "data": {"calibration": ["a.txt"], "router": ["b.txt"], "test": ["c.txt"], "window": 128},
    "experts": [
        {"name": "rtn", "method": "rtn", "scheme": "w4a16"},
        {"name": "theirs", "checkpoint": "somebody/quantized"},
    ],
}


@pytest.fixture
def recipe() -> Recipe:
    return parse_recipe(RECIPE)


@pytest.fixture
def place(tmp_path: Path) -> MixtureFolder:
    place = MixtureFolder(tmp_path)
    layers = [
        {"name": "model.layers.0.mlp.up_proj.weight", "substituted": ""},
        {"name": "model.layers.0.mlp.down_proj.weight", "substituted": "rows of 100 do not fit: rtn"},
    ]
    write_json(place.certificate("rtn"), {"layers": layers})
    gain = {"value": 0.01, "standard_error": 0.004, "documents": 9}
    candidates = [{"name": name, "loss": 3.0, "gain": gain} for name in ("linear", "knn")]
    guard = {"kept": True, "fallback": 1, "margin": 0.0, "switched": 0.25, "gain": gain}
    tuned = {"chosen": "knn", "candidates": candidates, "guard": guard, "novelty": None}
    selection = {
        "deployed": "tuned",
        "experts": ["rtn", "theirs"],
        "generalist": None,
        "tuned": tuned,
        "paper": {},
    }
    write_json(place.router("whole") / "selection.json", selection)
    return place


def test_the_context_comes_from_certificates_and_selection(place: MixtureFolder, recipe: Recipe) -> None:
    context = gather(place, recipe, ("whole", "prefix-64"), METRICS["nats_per_token"])
    assert [(one.expert, one.layer) for one in context.substitutions] == [
        ("rtn", "model.layers.0.mlp.down_proj.weight")
    ]
    assert list(context.candidates) == ["whole"]
    assert [(row.name, row.chosen) for row in context.candidates["whole"]] == [("linear", False), ("knn", True)]
    assert "kept the router" in context.guards["whole"]
    assert "25 % of the samples moved away from theirs" in context.guards["whole"]
    assert "somebody/quantized" in context.recipe_yaml


def test_a_generalist_is_named_and_what_went_to_it(place: MixtureFolder, recipe: Recipe) -> None:
    metric = METRICS["nats_per_token"]
    assert gather(place, recipe, ("whole",), metric).to_beat == "the best single expert"
    selection = read_json(place.router("whole") / "selection.json")
    selection["generalist"] = "theirs"
    selection["tuned"]["novelty"] = {"quantile": 0.99, "levels": [[64, 1.5, 1.0]], "neighbours": 5, "novel": 0.0125}
    write_json(place.router("whole") / "selection.json", selection)
    context = gather(place, recipe, ("whole",), metric)
    assert context.to_beat == "theirs"
    assert context.guards["whole"].endswith(
        " Of the router's own samples 1.2 % were unlike those of other documents; such samples go to theirs."
    )
    selection["tuned"]["guard"] = None
    write_json(place.router("whole") / "selection.json", selection)
    assert gather(place, recipe, ("whole",), metric).guards["whole"].startswith("Of the router's own samples")


def test_card_and_report_are_written_and_do_not_depend_on_the_folder(
    place: MixtureFolder, recipe: Recipe, by_hand: Callable[..., LossTable], judged: Callable[..., ProtocolVerdict]
) -> None:
    test = by_hand([[20.0, 21.0], [22.0, 21.0]] * 4, [19.0] * 8, experts=("rtn", "theirs"))
    found = judged(test, test, {"mixture": np.arange(8) % 2}, 0, 100)
    experts = {"rtn": ExpertSummary("rtn", "w4a16", 9, 0.5), "theirs": ExpertSummary("checkpoint", "as stored", 9, 0.0)}
    verdict = Verdict(recipe.hash, "nats_per_token", "whole", {"whole": found}, experts, 18, 12, 0, 100)
    publish(place, verdict, recipe)
    card, report = place.card.read_text(), place.report.read_text()
    for page in (card, report):
        assert recipe.hash in page
        assert "rows of 100 do not fit" in page
        assert str(place.path) not in page
        assert place.path.name not in page


def test_a_damaged_certificate_is_named(place: MixtureFolder, recipe: Recipe) -> None:
    place.certificate("rtn").write_text("{")
    with pytest.raises(CheckpointError, match="certificate"):
        gather(place, recipe, ("whole",), METRICS["nats_per_token"])


def test_routers_of_images_are_stated_in_accuracy(place: MixtureFolder, recipe: Recipe) -> None:
    selection = read_json(place.router("whole") / "selection.json")
    for row in selection["tuned"]["candidates"]:
        row["loss"] = 0.0688  # the share of wrong answers
    write_json(place.router("whole") / "selection.json", selection)
    context = gather(place, recipe, ("whole",), METRICS["top1"])
    assert [row.value for row in context.candidates["whole"]] == pytest.approx([0.9312, 0.9312])
    assert "+1.00 \N{PLUS-MINUS SIGN} 0.40 points of top-1 accuracy" in context.guards["whole"]


def test_training_of_scales_and_the_memory_curve_come_from_certificates(place: MixtureFolder, recipe: Recipe) -> None:
    layers = [{"name": f"model.layers.{k}.mlp.up_proj.weight", "substituted": ""} for k in range(4)]
    found = {
        "steps": 8,
        "kept_step": 4,
        "divergence": {"0": 0.5, "4": 0.25, "8": 0.3},
        "weights": {"code": 8.0},
        "blocks": [1],
        "own": {"windows": 12, "words": ["def", "return"]},
        "memory_curve": [{"memory": 1.0, "divergence": 0.3}, {"memory": 1.1, "divergence": 0.25}],
    }
    write_json(place.certificate("rtn"), {"codes_of": "generalist", "layers": layers, "distilled": found})
    write_json(place.certificate("theirs"), {"layers": layers, "distilled": None})
    context = gather(place, recipe, ("whole",), METRICS["nats_per_token"])
    expected = DistilledRow("rtn", "generalist", 0.5, 0.25, 4, 8, 12, ("def", "return"), 0.25)
    assert context.distilled == (expected,)
    assert context.memory == (MemoryPoint(1.0, 0.3), MemoryPoint(1.1, 0.25))
    write_json(place.certificate("rtn"), {"codes_of": "", "layers": layers, "distilled": found | {"text_weight": 0.5}})
    context = gather(place, recipe, ("whole",), METRICS["nats_per_token"])
    assert context.distilled[0].text_weight == 0.5
