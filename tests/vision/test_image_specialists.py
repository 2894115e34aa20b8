"""Specialists of images: what a recipe expands to and refuses, who sees what, rounds, and what a build leaves."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import moqe
from moqe.data.images import ImageSamples, ImageStore
from moqe.errors import DataError, MoqeError, RecipeError
from moqe.expert_options import Specialists
from moqe.folder import MixtureFolder
from moqe.formats.onnx_reader import read_onnx_layers
from moqe.progress import Silent
from moqe.recipe import dump_recipe, parse_recipe
from moqe.router.features import VectorFeatures
from moqe.tasks import image_specialists
from moqe.tasks.image_expert_files import expert_file
from moqe.tasks.image_specialists import family_passes, held_out_rows, routed_loss
from moqe.tasks.images import ImageTask

FAMILY = ("generalist", "for-cluster-1", "for-cluster-2")
QAT = {"steps": 4, "batch_size": 8}


def with_family(**options: Any) -> dict[str, Any]:
    """A recipe of the bundled classifier: one plain qat expert, a generalist and two specialists."""
    return {
        "base": "bundled:digits-resnet",
        "task": "image-classification",
        "data": {
            "calibration": ["bundled:digits/train"],
            "router": ["bundled:digits/router"],
            "test": ["bundled:digits/test"],
            "calibration_samples": 100,
            "router_samples": 60,
            "test_samples": 40,
        },
        "experts": [{"name": "plain", "method": "qat", "scheme": "w4a4", "qat": QAT}],
        "specialists": {"by": "cluster", "count": 2, "method": "qat", "scheme": "w4a4", "share": "none", "qat": QAT}
        | options,
        "router": {"epochs": 1, "policy": "cascade", "max_cost": 1.5},
        "bootstrap_samples": 100,
    }


def tree(folder: Path) -> dict[str, str]:
    """Digest of every file under a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def certificate(folder: Path, name: str) -> dict[str, Any]:
    """What a certificate says."""
    found: dict[str, Any] = json.loads((folder / "experts" / name / "certificate.json").read_text())
    return found


@pytest.fixture(scope="module")
def special(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture with specialists. Tests must leave it as it is."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("family") / "m"
    moqe.build(parse_recipe(with_family()), folder)
    return folder


def test_a_recipe_says_who_they_are() -> None:
    recipe = parse_recipe(with_family())
    assert [expert.name for expert in recipe.experts] == ["plain", *FAMILY]
    assert [expert.name for expert in recipe.family] == list(FAMILY)
    assert recipe.generalist == "generalist"
    assert all((one.method, one.scheme, one.qat.steps, one.codes_of) == ("qat", "w4a4", 4, "") for one in recipe.family)
    again = parse_recipe(yaml.safe_load(dump_recipe(recipe)))
    assert (again, again.hash) == (recipe, recipe.hash)
    assert "for-cluster" not in dump_recipe(recipe)
    shared = parse_recipe(with_family(share="codes"))
    assert [one.codes_of for one in shared.family] == ["", "generalist", "generalist"]
    assert {recipe.hash, shared.hash, parse_recipe(with_family(qat=QAT | {"steps": 7})).hash} > {recipe.hash}


def test_sections_of_image_methods_are_not_in_the_hash_of_texts() -> None:
    assert not {"qat", "brecq"} & set(Specialists().model_dump(mode="json"))
    assert Specialists.model_validate({"qat": {}}).model_dump()["qat"]["steps"] == 500


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"by": "domain"}, "choose by: cluster"),
        ({"count": None}, "count is missing"),
        ({"method": "gptq"}, "made by qat or brecq"),
        ({"method": "n2uq"}, "made by qat or brecq"),
        ({"brecq": {"steps": 3}}, "specialists.brecq has no effect where specialists.method is qat"),
        ({"memory": 1.5}, "memory has no effect where task is image-classification"),
        ({"distill": {"steps": 3}}, "distill has no effect where task is image-classification"),
        ({"group_size": 64}, "group_size has no effect where task is image-classification"),
        ({"symmetric": True}, "symmetric has no effect where task is image-classification"),
        ({"scheme": "w4a16"}, "unknown scheme"),
    ],
)
def test_what_makes_no_sense_for_images_is_refused(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=said) as caught:
        moqe.build(parse_recipe(with_family(**change)), tmp_path / "m")
    assert "\n" not in str(caught.value)


def test_image_options_are_refused_for_texts(recipe_content: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="qat has no effect where task is language"):
        parse_recipe(recipe_content | {"specialists": {"qat": QAT}})


def test_the_generalist_is_the_plain_expert(special: Path) -> None:
    plain, general, *others = (read_onnx_layers(expert_file(special / "experts" / name)) for name in ("plain", *FAMILY))
    for one, two in zip(plain, general, strict=True):
        assert torch.equal(one.weight.codes, two.weight.codes)
        assert torch.equal(one.weight.scale, two.weight.scale)
        assert one.input == two.input
    for other in others:
        assert any(not torch.equal(a.weight.codes, b.weight.codes) for a, b in zip(general, other, strict=True))


def test_certificates_say_what_members_saw(special: Path) -> None:
    general, first, second = (certificate(special, name) for name in FAMILY)
    assert general["specialised"] == {"own_images": 100, "own_weight": 1.0, "rounds": []}
    assert first["specialised"]["own_images"] + second["specialised"]["own_images"] == 100
    for found in (first, second):
        own = found["specialised"]["own_images"]
        assert found["layers"][0]["seen"] == 100 + 7 * own  # own_weight 8
    assert "specialised" not in certificate(special, "plain")
    assert not (special / ".work").exists()


def test_everything_falls_back_to_the_generalist(special: Path) -> None:
    selection = json.loads((special / "router" / "whole" / "selection.json").read_text())
    assert selection["generalist"] == "generalist"
    verdict = json.loads((special / "verdict.json").read_text())["protocols"]["whole"]
    assert set(verdict["policies"]) == {"route", "cascade"}
    assert set(verdict["experts"]) == {"plain", *FAMILY}


def test_who_was_fitted_before_a_stop_is_not_fitted_again(
    special: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    kept = image_specialists.ImageSpecialists._kept

    def stopping(self: Any, folder: Path, expert: Any, make: Any) -> Any:
        def counted() -> Any:
            if expert.name == "for-cluster-2" and made.count(expert.name) == 0:
                made.append(expert.name)
                raise MoqeError("stopped for the test")
            made.append(expert.name)
            return make()

        return kept(self, folder, expert, counted)

    monkeypatch.setattr(image_specialists.ImageSpecialists, "_kept", stopping)
    task = ImageTask(parse_recipe(with_family()), tmp_path / "m")
    with pytest.raises(MoqeError, match="stopped"):
        task.make_experts(Silent())
    assert not (tmp_path / "m" / "experts" / "generalist" / "certificate.json").exists()  # before all are fitted
    task.make_experts(Silent())
    assert made == [*FAMILY, "for-cluster-2"]
    (tmp_path / "m" / "experts" / "for-cluster-1" / "certificate.json").unlink()
    task.make_experts(Silent())
    assert made == [*FAMILY, "for-cluster-2"]
    assert tree(tmp_path / "m" / "experts") == tree(special / "experts")


def test_members_that_share_codes_differ_in_scales_also_after_a_round(tmp_path: Path) -> None:
    brecq = {"steps": 2, "batch_size": 8}
    content = with_family(method="brecq", brecq=brecq, share="codes", rounds=1)
    del content["specialists"]["qat"]
    content |= {"experts": [], "router": {"feature": "backbone"}}  # seen through the generalist
    ImageTask(parse_recipe(content), tmp_path / "m").make_experts(Silent())
    general, *others = (read_onnx_layers(expert_file(tmp_path / "m" / "experts" / name)) for name in FAMILY)
    for other in others:
        for one, two in zip(general, other, strict=True):
            assert torch.equal(one.weight.codes, two.weight.codes)
        assert any(not torch.equal(one.weight.scale, two.weight.scale) for one, two in zip(general, other, strict=True))
        assert any(one.input != two.input for one, two in zip(general, other, strict=True))
    found = certificate(tmp_path / "m", "for-cluster-1")
    assert found["codes_of"] == "generalist"
    (step,) = found["specialised"]["rounds"]
    assert step["round"] == 1
    assert min(step["before"], step["after"]) > 0
    assert found["layers"][0]["seen"] < 100 + 7 * 100  # a tenth of the images is held out
    assert found["layers"][0]["notes"]["scale_steps"] == 2


def test_a_dry_run_counts_rounds_and_weights() -> None:
    once = family_passes(parse_recipe(with_family(own_weight=2)), 100)
    assert once["for-cluster-1"] > once["generalist"]
    twice = family_passes(parse_recipe(with_family(own_weight=2, rounds=1)), 100)
    assert twice["for-cluster-1"] == 2 * once["for-cluster-1"]
    assert twice["generalist"] == once["generalist"]
    assert family_passes(parse_recipe(with_family(own_weight=None)), 100)["for-cluster-1"] > 3 * once["generalist"]
    assert moqe.plan(parse_recipe(with_family())).estimate.seconds["quantize"] > 0


def test_images_are_held_out_where_something_is_chosen() -> None:
    options = Specialists(by="cluster", count=2)
    train, held_out = held_out_rows(200, options, 0)
    assert (len(train), len(held_out)) == (200, 0)
    for chosen in (options.model_copy(update={"rounds": 1}), options.model_copy(update={"own_weight": None})):
        train, held_out = held_out_rows(200, chosen, 0)
        assert sorted([*train.tolist(), *held_out.tolist()]) == list(range(200))
        assert len(held_out) == 20
        assert held_out.tolist() != held_out_rows(200, chosen, 1)[1].tolist()
        with pytest.raises(DataError, match=r"raise data\.calibration_samples to 100"):
            held_out_rows(90, chosen, 0)


def test_a_family_is_judged_by_what_a_router_can_see() -> None:
    vectors = torch.randn(200, 4)
    names = tuple(str(number) for number in range(200))
    seen = torch.where(vectors[:, 0] > 0, 1.0, -1.0)
    losses = torch.stack([torch.ones(200), 1.0 - 0.5 * seen, 1.0 + 0.5 * seen], dim=1)  # one of two is always better
    assert routed_loss(VectorFeatures(vectors), losses, names, 0) < 0.6
    hidden = losses[torch.randperm(200)]  # nobody can see which
    assert 0.9 < routed_loss(VectorFeatures(vectors), hidden, names, 0) <= 1.0


@dataclass(frozen=True)
class _Member:
    """What a fake fit makes: how far from the base it is on own images."""

    own_weight: float


def test_an_open_weight_is_what_own_held_out_images_like_best(monkeypatch: pytest.MonkeyPatch) -> None:
    maker = object.__new__(image_specialists.ImageSpecialists)
    maker.options = Specialists(by="cluster", count=2, own_weight=None)
    maker.specialists = list(parse_recipe(with_family()).family[1:])
    maker.held_out = torch.tensor([0, 3, 4, 9])
    label = torch.tensor([0, 0, 0, 1, 1, 0, 0, 1, 1, 0])
    judged: list[list[int]] = []

    def losses(self: Any, member: Any, rows: torch.Tensor) -> torch.Tensor:
        judged.append(rows.tolist())
        best = 8.0 if 0 in rows else 16.0
        return torch.full((len(rows),), abs(member.own_weight - best))

    monkeypatch.setattr(image_specialists.ImageSpecialists, "_losses", losses)
    monkeypatch.setattr(
        image_specialists.ImageSpecialists, "_fit", lambda self, expert, own, weight, number, progress: _Member(weight)
    )
    found = maker._round(label, 0, None)  # type: ignore[arg-type]
    assert [member.own_weight for member in found] == [8.0, 16.0]
    assert judged == [[0, 9]] * 3 + [[3, 4]] * 3


class Kept(tuple[Any, ...]):
    """What a fake fit makes: name, round and number of own images."""

    own_weight = 4.0


def test_a_round_that_does_not_help_is_not_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found: dict[str, Any] = {}
    maker = object.__new__(image_specialists.ImageSpecialists)
    maker.recipe, maker.options = parse_recipe(with_family(rounds=3)), Specialists(by="cluster", count=2, rounds=3)
    maker.generalist, *maker.specialists = maker.recipe.family
    maker.folder = MixtureFolder(tmp_path)
    names = tuple(map(str, range(40)))
    maker.samples = ImageSamples(ImageStore([]), torch.arange(40), names, names, torch.arange(40) % 2)
    maker.features = lambda: VectorFeatures(torch.randn(40, 3))
    maker.held_out = torch.empty(0, dtype=torch.int64)
    scores = iter([3.0, 2.0, 2.5, 0.0])
    patches: dict[str, Any] = {
        "_fit": lambda self, expert, own, weight, number, progress: Kept((expert.name, number, int(own.sum()))),
        "_losses": lambda self, member, rows: torch.full((len(rows),), float(member[0] == "for-cluster-1")),
        "_score": lambda self, members: next(scores),
        "_place": lambda self, expert, member: None,
        "_finish": lambda self, expert, member, facts: found.update({expert.name: (member, facts)}),
    }
    for name, fake in patches.items():
        monkeypatch.setattr(image_specialists.ImageSpecialists, name, fake)
    maker.run(None)  # type: ignore[arg-type]
    assert found["for-cluster-1"][0] == ("for-cluster-1", 1, 0)  # the second follows the base on every image
    assert found["for-cluster-2"][0] == ("for-cluster-2", 1, 40)
    assert found["for-cluster-2"][1]["own_images"] == 40
    rounds = found["generalist"][1]["rounds"]
    assert [(one["round"], one["before"], one["after"]) for one in rounds] == [(1, 3.0, 2.0), (2, 2.0, 2.5)]
