"""A mixture that probes: built, judged, loaded; and a loaded mixture that meets something new."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import moqe
from moqe.errors import RecipeError
from moqe.router import NoveltyRouter, RoutingExamples, TokenFeatures, load_router, save_router
from moqe.router.novelty import fit_novelty

TEXT = "def return self value for in range print if else import list dict def return self value for in range"


@pytest.fixture(scope="module")
def probing(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built mixture with another policy, which nothing before the verdict depends on."""
    folder = tmp_path_factory.mktemp("probe") / "m"
    shutil.copytree(built, folder)
    recipe = moqe.load_recipe(folder / "recipe.yaml")
    other = recipe.model_copy(update={"router": recipe.router.model_copy(update={"policy": "probe"})})
    (folder / "recipe.yaml").write_text(moqe.recipe.dump_recipe(other))
    manifest = json.loads((folder / "mixture.json").read_text())
    (folder / "mixture.json").write_text(json.dumps(manifest | {"recipe": other.hash}))
    moqe.evaluate(folder)
    return folder


def verdict(folder: Path, protocol: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "verdict.json").read_text())["protocols"][protocol]
    return found


def test_a_build_shows_what_a_probe_and_a_label_would_do(built: Path) -> None:
    found = verdict(built, "prefix-16")
    assert found["policy"] == "route"
    assert set(found["policies"]) == {"route", "probe"}
    assert found["policies"]["route"] == found["mixture"]
    assert found["policies"]["probe"]["cost"] == pytest.approx((4 * 16 + 32) / 48)
    assert found["domain_label"]["value"] >= found["oracle"]
    whole = verdict(built, "whole")
    assert whole["policies"] == {}
    assert whole["domain_label"]["cost"] == 1.0


def test_a_mixture_that_probes_is_judged_as_one(built: Path, probing: Path) -> None:
    before, now = verdict(built, "prefix-16"), verdict(probing, "prefix-16")
    assert now["policy"] == "probe"
    assert now["mixture"] == before["policies"]["probe"]
    assert now["policies"] == before["policies"]
    assert verdict(probing, "whole") == verdict(built, "whole")  # the router's: there is nothing before a whole window


def test_a_loaded_mixture_really_scores_the_first_tokens(built: Path, probing: Path) -> None:
    mixture = moqe.load(probing)
    ids = torch.tensor(mixture.tokenizer(TEXT)["input_ids"])
    assert len(ids) > 16
    seen = {name: mixture.runtime(name).score(ids[None, :16]).double().mean().item() for name in mixture.experts}
    decision = mixture.route(TEXT)
    assert decision.costs == seen
    assert decision.expert == min(seen, key=lambda name: seen[name])
    assert (decision.unit, decision.protocol) == ("nats", "prefix-16")
    assert decision.reason == "lowest loss of 4 on the first 16 tokens"
    assert mixture.score(TEXT).expert == mixture.generate(TEXT, max_new_tokens=1).expert == decision.expert
    assert mixture.score(TEXT).reason == decision.reason
    assert mixture.score(TEXT, expert="kq").reason == "pinned"
    assert mixture.route(ids[:5]).reason == "lowest loss of 4 on the first 5 tokens"
    assert "by" in mixture.route(ids[:1]).reason  # nothing to score: the router's
    assert mixture.route(ids[:1]).costs == moqe.load(built).route(ids[:1]).costs
    assert mixture.route(TEXT, protocol="whole").costs == moqe.load(built).route(TEXT, protocol="whole").costs


def test_a_runtime_in_an_expert_s_place_answers_probes_too(probing: Path) -> None:
    class Certain:
        """Predicts everything."""

        name = "certain"

        def score(self, tokens: torch.Tensor) -> torch.Tensor:
            return torch.zeros(len(tokens), tokens.shape[1] - 1)

    mixture = moqe.load(probing)
    mixture.use("kq", Certain())
    assert mixture.route(TEXT).expert == "kq"
    assert mixture.route(TEXT).costs["kq"] == 0.0
    with pytest.raises(moqe.MoqeError, match="no expert 'nobody'"):
        mixture.use("nobody", Certain())


def test_no_expert_of_a_probing_mixture_is_timed_in_the_reference(
    probing: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moqe.runtimes.reference import ReferenceRuntime

    def refuse(*arguments: object) -> None:
        raise AssertionError("the reference runs")

    for name in ("score", "generate"):
        monkeypatch.setattr(ReferenceRuntime, name, refuse)
    found = moqe.bench(
        probing, runtime="llama.cpp", prompt_tokens=24, new_tokens=2, requests=1, threads=1, memory=False
    )
    assert {line.runtime for line in found.lines if line.name in ("gptq", "mixture")} == {"llama.cpp"}


def test_a_text_like_no_other_goes_to_the_fallback_and_the_reason_says_so(built: Path, tmp_path: Path) -> None:
    shutil.copytree(built, tmp_path / "m")
    mixture = moqe.load(built)
    known = torch.tensor(mixture.tokenizer(TEXT * 8)["input_ids"])[: 16 * 12].view(12, 16)
    features = TokenFeatures(known, mixture._shared.embedding)
    examples = RoutingExamples(features, torch.zeros(12, 4), tuple(str(row) for row in range(12)))
    place = tmp_path / "m" / "router" / "prefix-16" / "mixture"
    inner = load_router(place)
    worst = int(inner.predict(features)[0].argmax())
    save_router(NoveltyRouter(inner, worst, fit_novelty(examples, examples, 0.99)), place)
    new = moqe.load(tmp_path / "m").route("0123456789 0123456789 0123456789")
    assert new.expert == mixture.experts[worst]
    assert new.reason == f"unlike anything that {inner.name} was trained on, seeing 16 tokens"
    usual = moqe.load(tmp_path / "m").route(known[3])
    assert usual.costs == mixture.route(known[3]).costs
    assert usual.reason == mixture.route(known[3]).reason


@pytest.mark.parametrize(
    ("router", "protocol", "message"),
    [
        ({"policy": "cascade"}, {}, "router.policy cascade averages class probabilities, of images"),
        ({"policy": "probe"}, {"route_on": "whole"}, "set protocol.route_on to prefix"),
        ({"policy": "probe"}, {"prefix": 1}, "protocol.prefix to 2 or more"),
        ({"novelty": 1.0}, {}, "less than 1"),
    ],
)
def test_policies_that_cannot_be(
    recipe_content: dict[str, Any], router: dict[str, Any], protocol: dict[str, Any], message: str
) -> None:
    recipe_content["router"] |= router
    recipe_content["protocol"] |= protocol
    with pytest.raises(RecipeError, match=message) as error:
        moqe.parse_recipe(recipe_content)
    assert "\n" not in str(error.value)


def test_images_cannot_be_probed() -> None:
    content = {
        "base": "bundled:digits-resnet",
        "task": "image-classification",
        "data": {part: [f"bundled:digits/{part}"] for part in ("router", "test")}
        | {"calibration": ["bundled:digits/train"]},
        "experts": [{"name": "ptq", "method": "ptq", "scheme": "w8a8"}],
        "router": {"policy": "probe"},
    }
    with pytest.raises(RecipeError, match="probe scores the first tokens of texts: choose route or cascade"):
        moqe.parse_recipe(content)


def test_a_damaged_router_is_told_when_it_is_asked(built: Path, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(built, folder)
    (folder / "router" / "prefix-16" / "mixture" / "router.safetensors").write_bytes(b"none")
    mixture = moqe.load(folder)
    assert mixture.score(TEXT, expert="kq").reason == "pinned"  # nobody asks the router
    for _ in range(2):
        with pytest.raises(moqe.MoqeError, match=r"router\.safetensors is damaged"):
            mixture.route(TEXT)
    assert "lowest predicted cost" in mixture.route(TEXT, protocol="whole").reason
