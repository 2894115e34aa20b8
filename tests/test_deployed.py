"""What is loaded does what was judged: choices of a deployed mixture against those of its verdict, expert by expert.

Recipes here list experts in another order than the alphabet's, in which files list them.
"""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch

import moqe
from moqe.data.samples import TextSamples
from moqe.errors import CheckpointError
from moqe.evaluate.verdict import read_verdict
from moqe.folder import MixtureFolder
from moqe.mixture import LanguageMixture
from moqe.progress import Silent
from moqe.router.baselines import Constant
from moqe.router.saved import save_router
from moqe.store import read_json, write_json
from moqe.tasks.language import LanguageTask


def test_samples(folder: Path) -> TextSamples:
    """The test samples that a mixture was judged on."""
    task = LanguageTask(moqe.load_recipe(folder / "recipe.yaml"), folder)
    task.identity(Silent())
    return task.splits()["test"]


test_samples.__test__ = False  # type: ignore[attr-defined]


def plant(folder: Path, costs: list[float]) -> None:
    """Deploy a router that predicts these costs, in the recipe's order, under every protocol."""
    place = MixtureFolder(folder)
    for protocol in read_json(place.manifest)["protocols"]:
        shutil.rmtree(place.router(protocol) / "mixture")
        save_router(Constant(torch.tensor(costs)), place.router(protocol) / "mixture")


def test_costs_are_the_recipes_experts(built: Path, tmp_path: Path) -> None:
    names = [expert.name for expert in moqe.load_recipe(built / "recipe.yaml").experts]
    assert names != sorted(names)
    shutil.copytree(built, tmp_path / "m")
    for position, name in enumerate(names):
        costs = [float(abs(position - other)) for other in range(len(names))]
        plant(tmp_path / "m", costs)
        mixture = moqe.load(tmp_path / "m")
        for protocol in mixture.manifest["protocols"]:
            decision = mixture.route("the old river", protocol=protocol)
            assert (decision.expert, decision.costs) == (name, dict(zip(names, costs, strict=True)))
            assert ("of the 16 it was trained on" in decision.reason) == (protocol == "prefix-16")
        assert mixture.score("the old river").expert == name
    assert list(mixture.experts) == list(moqe.inspect(tmp_path / "m")["certificates"]) == names


def test_a_deployed_mixture_chooses_and_scores_as_judged(special: Path) -> None:
    mixture, test = moqe.load(special), test_samples(special)
    assert isinstance(mixture, LanguageMixture)
    verdict = read_verdict(MixtureFolder(special).verdict)
    several = 0
    for protocol, found in verdict.protocols.items():
        chosen = [mixture.route(window, protocol=protocol).expert for window in test.tokens]
        counts = Counter(chosen)
        several += len(counts) > 1
        assert {name: counts[name] / len(test) for name in mixture.experts} == pytest.approx(found.mixture.share)
        if protocol == "whole":
            scores = [mixture.score(window, expert=name) for window, name in zip(test.tokens, chosen, strict=True)]
            nats = sum(score.nats for score in scores) / sum(score.tokens for score in scores)
            assert nats == pytest.approx(found.mixture.value, rel=1e-5)
    assert several  # otherwise a mixture that always asks the same expert would pass


def test_a_manifest_with_other_experts_than_the_recipe_is_refused(built: Path, tmp_path: Path) -> None:
    shutil.copytree(built, tmp_path / "m")
    place = MixtureFolder(tmp_path / "m")
    manifest = read_json(place.manifest)
    manifest["experts"]["more"] = manifest["experts"].pop("rtn")
    write_json(place.manifest, manifest)
    with pytest.raises(CheckpointError, match=r"has other experts than .*recipe\.yaml"):
        moqe.load(tmp_path / "m")


def test_a_text_is_cut_into_the_tokens_that_windows_have(built: Path, tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    shutil.copytree(built, tmp_path / "m")
    plain = moqe.load(built)
    text = "the old river walked into the house"
    assert plain._ids(text).tolist() == plain.tokenizer(text)["input_ids"]  # type: ignore[attr-defined]
    mixture = moqe.load(tmp_path / "m")
    assert isinstance(mixture, LanguageMixture)
    begin, end = (mixture.tokenizer.convert_ids_to_tokens(number) for number in (3, 0))
    mixture.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{begin} $A {end}", special_tokens=[(begin, 3), (end, 0)]
    )
    mixture.tokenizer.bos_token = begin
    inside = plain.tokenizer(text)["input_ids"]  # type: ignore[attr-defined]
    assert mixture.tokenizer(text)["input_ids"] == [3, *inside, 0]
    assert mixture._ids(text).tolist() == [3, *inside]
    assert mixture.score(text).tokens == len(inside)
