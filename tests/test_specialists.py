"""Specialists from a recipe: what it expands to, what a build leaves on disk, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tests.conftest import SHORT, recipe_for, with_specialists

import moqe
from moqe.data.samples import TextSamples
from moqe.errors import DataError, RecipeError
from moqe.formats import open_expert
from moqe.method_options import Distill
from moqe.models.clusters import telling_tokens, text_clusters
from moqe.progress import Silent
from moqe.quantized import IntegerTensor
from moqe.recipe import dump_recipe, parse_recipe
from moqe.store import read_json
from moqe.tasks.distiller import validation_rows
from moqe.tasks.language import LanguageTask

BOOK = {"domain": "book", "separator": "none"}
MEMBERS = ("generalist", "for-code", "for-prose", "for-numbers")


def test_a_recipe_with_specialists_says_who_they_are(recipe_content: dict[str, Any]) -> None:
    recipe = parse_recipe(with_specialists(recipe_content, own_weight=5))
    assert [expert.name for expert in recipe.experts] == ["rtn", *MEMBERS]
    generalist, code = recipe.experts[1:3]
    assert (generalist.codes_of, generalist.distill.weights) == ("", {})  # type: ignore[union-attr]
    assert (code.codes_of, code.distill.weights) == ("generalist", {"code": 5.0})  # type: ignore[union-attr]
    assert (code.method, code.scheme, code.group_size) == ("gptq", "w4a16", 64)
    assert recipe.generalist == "generalist"
    again = parse_recipe(yaml.safe_load(dump_recipe(recipe)))
    assert again == recipe
    assert again.hash == recipe.hash
    assert "for-code" not in dump_recipe(recipe)


def test_only_named_domains_get_a_specialist(recipe_content: dict[str, Any]) -> None:
    every = parse_recipe(with_specialists(recipe_content))
    some = parse_recipe(with_specialists(recipe_content, domains=["prose", "code"]))
    named = [expert.name for expert in every.experts if expert.name in ("for-code", "for-prose")]
    assert [expert.name for expert in some.experts] == ["rtn", "generalist", *named]
    assert some.hash != every.hash
    assert "domains" not in yaml.safe_load(dump_recipe(every))["specialists"]


def test_a_text_weight_is_everybody_s_and_unknown_to_hashes_when_it_is_0(recipe_content: dict[str, Any]) -> None:
    plain = parse_recipe(with_specialists(recipe_content))
    for weight in (0.0, 0.5):
        recipe = parse_recipe(with_specialists(recipe_content, distill=SHORT | {"text_weight": weight}))
        assert [expert.distill.text_weight for expert in recipe.experts[1:]] == [weight] * 4  # type: ignore[union-attr]
        assert (recipe.hash == plain.hash) == (weight == 0)
        assert parse_recipe(yaml.safe_load(dump_recipe(recipe))).hash == recipe.hash
    with pytest.raises(RecipeError, match="text_weight"):
        parse_recipe(with_specialists(recipe_content, distill=SHORT | {"text_weight": 1.0}))


def test_experts_follow_the_text_and_the_verdict_says_so(
    special: Path, loud_base: Path, texts: Path, tmp_path: Path
) -> None:
    content = with_specialists(recipe_for(loud_base, texts), distill=SHORT | {"text_weight": 0.5})
    verdict = moqe.build(moqe.parse_recipe(content), tmp_path / "m").verdict
    assert verdict.text_weight == 0.5
    for name in MEMBERS:
        mixed, alone = (
            read_json(folder / "experts" / name / "certificate.json")["distilled"]
            for folder in (tmp_path / "m", special)
        )
        assert mixed["text_weight"] == 0.5
        assert "text_weight" not in alone
        assert mixed["divergence"] != alone["divergence"]


def test_specialists_branch_from_the_generalist_s_training(recipe_content: dict[str, Any]) -> None:
    recipe = parse_recipe(with_specialists(recipe_content, distill=SHORT | {"branch_after": 3}))
    assert [expert.distill.branch_after for expert in recipe.experts[1:]] == [0, 3, 3, 3]  # type: ignore[union-attr]


def test_specialists_that_share_nothing_have_statistics_of_their_own(recipe_content: dict[str, Any]) -> None:
    recipe = parse_recipe(with_specialists(recipe_content, share="none", own_weight=4))
    assert all(not expert.codes_of for expert in recipe.experts)
    assert recipe.experts[2].calibration == {"code": 4.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"by": "cluster"}, "specialists.count is missing"),
        ({"count": 7}, "there are 3 domains to make specialists for"),
        ({"domains": []}, "at least 1 item"),
        ({"by": "cluster", "count": 2, "domains": ["code"]}, "specialists.domains needs by: domain"),
        ({"domains": ["cod"]}, "no calibration source of 'cod'"),
        ({"own_weight": 1.0}, "greater than 1"),
        ({"distill": {"steps": 4, "branch_after": 4}}, "must be below steps"),
        ({"scheme": "w5a16"}, "unknown scheme"),
        ({"share": "none", "distill": {"branch_after": 2}}, "needs share: codes"),
        ({"share": "none", "memory": 1.2}, "only scales can be left out"),
        ({"share": "none", "rounds": 1}, "specialists.rounds needs share: codes"),
        ({"method": "imatrix", "scheme": "q4_k", "group_size": None, "memory": 1.1}, "which q4_k has not"),
    ],
)
def test_what_cannot_be_specialised_is_one_clear_line(
    recipe_content: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        moqe.plan(parse_recipe(with_specialists(recipe_content, **change)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("task", "runtime"), [("language", "onnx"), ("image-classification", "bfloat16")])
def test_a_runtime_of_the_other_task_is_refused(recipe_content: dict[str, Any], task: str, runtime: str) -> None:
    data = {name: ["x"] for name in ("calibration", "router", "test")}
    vision = {"base": "x", "data": data, "experts": [{"name": "ptq", "method": "ptq", "scheme": "w8a8"}]}
    content = recipe_content if task == "language" else vision
    with pytest.raises(RecipeError, match=f"runtime {runtime} does not exist"):
        parse_recipe(content | {"task": task, "runtime": runtime})


def test_products_in_bfloat16_are_named_and_close(recipe_content: dict[str, Any], tmp_path: Path) -> None:

    found = {}
    for runtime in ("reference", "bfloat16"):
        task = LanguageTask(parse_recipe(recipe_content | {"runtime": runtime}), tmp_path)
        assert task.runtime_name == runtime
        found[runtime] = torch.from_numpy(task.losses("base", "test", range(4)).losses["whole"][task.metric].loss_sum)
    assert not torch.equal(found["reference"], found["bfloat16"])
    torch.testing.assert_close(found["bfloat16"], found["reference"], rtol=0.05, atol=1.0)


@pytest.mark.parametrize(
    ("expert", "message"),
    [
        ({"codes_of": "nobody", "distill": {}}, "codes_of: known: rtn, second"),
        ({"codes_of": "rtn"}, "no distill: it would be equal"),
        ({"codes_of": "rtn", "scheme": "w4a16", "distill": {}}, "remove scheme"),
        ({"method": "rtn", "scheme": "w4a16", "distill": {"branch_after": 2}}, "branch_after needs codes_of"),
        ({"codes_of": "second", "distill": {}}, "has no codes of its own"),
        ({"codes_of": "rtn", "distill": {"branch_after": 2}}, "'rtn' is distilled for 0 steps"),
    ],
)
def test_codes_of_another_expert_are_checked(
    recipe_content: dict[str, Any], expert: dict[str, Any], message: str
) -> None:
    second = {"name": "second", "codes_of": "rtn", "distill": {}}
    listed = [{"name": "rtn", "method": "rtn", "scheme": "w4a16"}, second, {"name": "third"} | expert]
    with pytest.raises(RecipeError, match=message):
        parse_recipe(recipe_content | {"experts": listed})


def test_codes_are_on_disk_once_and_scales_differ(special: Path) -> None:
    experts = [special / "experts" / name for name in MEMBERS]
    for number in (2, 3):  # a specialist whose validation never improved keeps the untrained scales
        codes = {(folder / f"codes-{number:05d}-of-00003.safetensors").stat().st_ino for folder in experts}
        scales = {(folder / f"scales-{number:05d}-of-00003.safetensors").read_bytes() for folder in experts}
        assert len(codes) == 1
        assert len(scales) >= 3
    name = "model.layers.1.mlp.down_proj.weight"
    loaded = [open_expert(folder).load(name) for folder in experts]
    for tensor in loaded:
        assert isinstance(tensor, IntegerTensor)
        assert torch.equal(tensor.codes, loaded[0].codes)  # type: ignore[union-attr]
    assert not (special / ".work").exists()


def test_one_more_specialist_costs_its_scales(special: Path) -> None:
    codes, *_ = (special / "experts" / "generalist").glob("codes-00002*")
    scales, *_ = (special / "experts" / "for-code").glob("scales-00002*")
    assert scales.stat().st_size < 0.12 * codes.stat().st_size  # 16 bits a group of 64 against 4 bits a weight: 6 %
    verdict = json.loads((special / "verdict.json").read_text())
    alone = {name: found["bytes_on_disk"] for name, found in verdict["experts"].items()}
    assert verdict["mixture_bytes"] < 0.7 * sum(alone.values())


@pytest.mark.filterwarnings("ignore")  # those of transformers and compressed-tensors
def test_a_specialist_s_folder_loads_in_transformers(special: Path) -> None:
    from transformers import AutoModelForCausalLM

    tokens = torch.arange(1, 25)[None]
    theirs = AutoModelForCausalLM.from_pretrained(
        special / "experts" / "for-code",
        dtype=torch.float32,
    )
    mixture = moqe.load(special)
    ours = mixture.runtime("for-code").logits(tokens)  # type: ignore[attr-defined]
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, ours, rtol=1e-3, atol=1e-3)


def test_certificates_say_how_scales_were_trained(special: Path) -> None:
    certificate = json.loads((special / "experts" / "for-prose" / "certificate.json").read_text())
    assert certificate["expert"] == "for-prose"
    assert certificate["codes_of"] == "generalist"
    trained = certificate["distilled"]
    assert trained["weights"] == {"prose": 8.0}
    assert trained["steps"] == 6
    assert set(trained["divergence"]) == {"0", "2", "4", "6"}
    plain = json.loads((special / "experts" / "rtn" / "certificate.json").read_text())
    assert plain["distilled"] is None


def test_building_again_gives_the_same_bytes(special: Path, loud_base: Path, texts: Path, tmp_path: Path) -> None:
    from tests.test_pipeline import tree

    moqe.build(moqe.parse_recipe(with_specialists(recipe_for(loud_base, texts))), tmp_path / "again")
    assert tree(tmp_path / "again") == tree(special)


def test_clusters_need_no_labels_and_rounds_are_written_down(loud_base: Path, texts: Path, tmp_path: Path) -> None:
    content = with_specialists(recipe_for(loud_base, texts), by="cluster", count=2, rounds=1, own_weight=None)
    content["specialists"]["distill"] = SHORT | {"steps": 2}
    moqe.build(moqe.parse_recipe(content), tmp_path / "m")
    certificate = json.loads((tmp_path / "m" / "experts" / "for-cluster-1" / "certificate.json").read_text())
    (step,) = certificate["distilled"]["rounds"]
    assert step["round"] == 1
    assert step["before"] >= 0
    assert certificate["distilled"]["own"]["windows"] > 0
    assert certificate["distilled"]["own"]["words"]
    assert "telling words" in (tmp_path / "m" / "report.html").read_text()


def test_a_resumed_build_knows_who_got_which_window(
    loud_base: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moqe.tasks.distiller import Distiller

    content = with_specialists(recipe_for(loud_base, texts), domains=["code", "prose"], rounds=1)
    content["specialists"]["distill"] = SHORT | {"steps": 2}
    recipe, folder, train = parse_recipe(content), tmp_path / "m", Distiller._train

    def interrupted(*arguments: Any) -> Any:
        if arguments[5] == 1:
            raise KeyboardInterrupt
        return train(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Distiller, "_train", interrupted)
        with pytest.raises(KeyboardInterrupt):
            LanguageTask(recipe, folder).make_experts(Silent())
    place = folder / ".work" / "distill" / "generalist" / "assigned-1.json"
    assert set(read_json(place)) == {"for-code", "for-prose"}
    everything_prose = ["for-prose"] * len(read_json(place))
    place.write_text(json.dumps(everything_prose))
    labels: list[list[str]] = []
    monkeypatch.setattr(Distiller, "_train", lambda *given: labels.append(list(given[4])) or train(*given))
    LanguageTask(recipe, folder).make_experts(Silent())
    assert labels[-2:] == [everything_prose] * 2  # what was written is what the second round is trained on


def test_memory_is_spent_within_its_bound(loud_base: Path, texts: Path, tmp_path: Path) -> None:
    content = with_specialists(recipe_for(loud_base, texts), memory=1.04)
    moqe.build(moqe.parse_recipe(content), tmp_path / "m")
    experts = [tmp_path / "m" / "experts" / name for name in MEMBERS]
    files = {path.stat().st_ino: path.stat().st_size for place in experts for path in place.glob("*.safetensors")}
    one = sum(path.stat().st_size for path in experts[0].glob("*.safetensors"))
    certificates = [json.loads((place / "certificate.json").read_text())["distilled"] for place in experts]
    curve = certificates[0]["memory_curve"]
    assert [len(certificate["blocks"]) for certificate in certificates[1:]] != [2, 2, 2]  # not everything fits
    assert 1.0 < sum(files.values()) / one <= 1.04
    assert curve[-1]["memory"] == pytest.approx(sum(files.values()) / one, rel=1e-5)
    assert curve[0]["memory"] == 1.0
    assert curve[-1]["divergence"] < curve[0]["divergence"]
    assert "What memory buys" in (tmp_path / "m" / "report.html").read_text()
    assert moqe.load(tmp_path / "m").score("one two three", expert="for-code").tokens > 0  # type: ignore[attr-defined]


def test_clusters_are_the_domains_where_words_tell_them_apart(tiny_base: Path, recipe_content: dict[str, Any]) -> None:
    from moqe.models.decoder import Decoder

    recipe = parse_recipe(recipe_content | {"experts": [{"name": "rtn", "method": "rtn", "scheme": "w4a16"}]})
    samples = LanguageTask(recipe, Path("unused")).splits()["router_train"]
    found = text_clusters(samples.tokens, Decoder.open(recipe.base).embedding(), 3, seed=0)
    pairs = set(zip(found, samples.domain, strict=True))
    assert len(pairs) == 3
    with pytest.raises(DataError, match=r"lower specialists\.count"):
        text_clusters(torch.zeros(4, 8, dtype=torch.int64), torch.randn(3, 5), 2, seed=0)


def test_telling_words_are_those_of_the_windows_inside() -> None:
    words = ["the", "a", "def", "self", "love", "  ", "x"]
    random = torch.Generator().manual_seed(0)
    common = torch.randint(0, 2, (40, 16), generator=random)
    tokens = common.clone()
    tokens[:20, ::4], tokens[20:, ::4] = 2, 4  # only some windows say `def`, only the others `love`
    tokens[:10, 1], tokens[:20, 2], tokens[:20, 3] = 3, 5, 6
    inside = [row < 20 for row in range(40)]
    found = telling_tokens(tokens, inside, lambda ids: words[ids[0]])
    assert found[:2] == ["def", "self"]
    assert "x" not in found
    assert "love" not in found
    assert telling_tokens(tokens, [True] * 40, lambda ids: words[ids[0]]) == []


def test_validation_takes_whole_documents_of_every_domain() -> None:
    document = tuple(f"d{number // 2}" for number in range(40))
    domain = tuple("a" if number < 30 else "b" for number in range(40))
    samples = TextSamples(torch.zeros(40, 4, dtype=torch.int64), document, domain, (1,) * 40)
    train, validation = validation_rows(samples, Distill(validation_share=0.2, validation_windows=6), seed=0)
    assert not {document[row] for row in train.tolist()} & {document[row] for row in validation.tolist()}
    assert {domain[row] for row in validation.tolist()} == {"a", "b"}
    assert len(validation) == 6
    assert len(train) == 40 - 2 * (3 + 1)  # three of fifteen documents, one of five, two windows each


def test_clusters_that_cut_documents_leave_as_much_to_train_on() -> None:
    """Of documents whose windows are in many clusters no more are held out than of documents in one."""
    windows, clusters = 20, 6
    document = tuple(f"d{number // windows}" for number in range(30 * windows))
    domain = tuple(f"cluster-{number % clusters}" for number in range(len(document)))
    samples = TextSamples(torch.zeros(len(document), 4, dtype=torch.int64), document, domain, (1,) * len(document))
    options = Distill(validation_share=0.1, validation_windows=1000)
    train, validation = validation_rows(samples, options, seed=0)
    assert len(train) >= 0.8 * len(document)
    assert len(train) + len(validation) == len(document)
    assert {domain[row] for row in validation.tolist()} == set(domain)


def test_a_branch_that_is_never_reached_is_refused(recipe_content: dict[str, Any]) -> None:
    owner = {"name": "a", "method": "rtn", "scheme": "w4a16", "distill": {"steps": 6}}
    member = {"name": "b", "codes_of": "a", "distill": {"steps": 9, "branch_after": 8}}
    with pytest.raises(RecipeError, match="branch_after is 8, and 'a' is distilled for 6 steps"):
        parse_recipe(recipe_content | {"experts": [owner, member]})
    member["distill"] = {"steps": 9, "branch_after": 6}
    assert len(parse_recipe(recipe_content | {"experts": [owner, member]}).experts) == 2


def test_a_domain_of_one_document_is_refused_before_anything_is_made(
    loud_base: Path, texts: Path, tmp_path: Path
) -> None:
    (tmp_path / "book.txt").write_text("it was a dark night and the river ran by the old mill " * 200)
    content = with_specialists(recipe_for(loud_base, texts), domains=["book"])
    content["data"]["calibration"] = [*content["data"]["calibration"], {"path": str(tmp_path / "book.txt")} | BOOK]
    with pytest.raises(DataError, match=r"the domain 'book', whose calibration text is one document.*`separator`"):
        moqe.build(moqe.parse_recipe(content), tmp_path / "m")
    assert not list((tmp_path / "m" / "experts").glob("*/*.safetensors"))


def test_rounds_and_memory_are_those_of_the_family_they_were_asked_for(
    loud_base: Path, texts: Path, tmp_path: Path
) -> None:
    content = with_specialists(recipe_for(loud_base, texts), domains=["code", "prose"], rounds=1, memory=1.02)
    content["specialists"]["distill"] = SHORT | {"steps": 2}
    content["experts"] = [
        {"name": "own", "method": "rtn", "scheme": "w4a16", "group_size": 64, "distill": SHORT},
        {"name": "other", "codes_of": "own", "distill": SHORT | {"weights": {"code": 8.0}}},
    ]
    task = LanguageTask(moqe.parse_recipe(content), tmp_path)
    task.make_experts(Silent())
    found = {
        name: read_json(tmp_path / "experts" / name / "certificate.json")["distilled"] for name in ("other", "for-code")
    }
    assert found["for-code"]["rounds"]
    assert len(found["for-code"]["blocks"]) < 2
    assert not found["other"].get("rounds")
    assert "blocks" not in found["other"]


def test_a_listed_expert_with_the_generalist_s_codes_keeps_its_own_scales(
    loud_base: Path, texts: Path, tmp_path: Path
) -> None:
    content = with_specialists(recipe_for(loud_base, texts), domains=["code", "prose"], rounds=1, memory=1.02)
    content["specialists"]["distill"] = SHORT | {"steps": 2}
    content["experts"] = [{"name": "more", "codes_of": "generalist", "distill": SHORT | {"steps": 4}}]
    LanguageTask(moqe.parse_recipe(content), tmp_path).make_experts(Silent())
    more, general = (tmp_path / "experts" / name for name in ("more", "generalist"))
    assert "blocks" not in read_json(more / "certificate.json")["distilled"]
    assert not {path.stat().st_ino for path in more.glob("scales-*")} & {
        path.stat().st_ino for path in general.glob("scales-*")
    }


def test_clusters_leave_no_domains_to_weigh(recipe_content: dict[str, Any], tmp_path: Path) -> None:
    listed = {"name": "mine", "method": "gptq", "scheme": "w4a16", "group_size": 64, "calibration": {"code": 4}}
    content = with_specialists(recipe_content, by="cluster", count=2) | {"experts": [listed]}
    with pytest.raises(RecipeError, match=r"expert 'mine' weighs the domain 'code', and with specialists\.by: cluster"):
        LanguageTask(parse_recipe(content), tmp_path).splits()


def test_who_shares_codes_branches_from_one_training_of_the_same_parts(recipe_content: dict[str, Any]) -> None:
    owner = {"name": "a", "method": "rtn", "scheme": "w4a16", "distill": {"weights": {"code": None}}}
    member = {"name": "b", "codes_of": "a", "distill": {"branch_after": 1}}
    with pytest.raises(RecipeError, match="branch_after needs one training to branch from, and 'a' tries several"):
        parse_recipe(recipe_content | {"experts": [owner, member]})
    owner["distill"] = {"norms": True}
    with pytest.raises(RecipeError, match=r"distill\.norms must be as for 'a'"):
        parse_recipe(recipe_content | {"experts": [owner, member]})


def test_every_training_has_the_products_it_asks_for(
    loud_base: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moqe.methods.distill import Targets

    used: list[torch.dtype] = []
    later = Targets.later

    def watched(decoder: Any, tokens: Any, dtype: torch.dtype, *others: Any) -> Targets:
        used.append(dtype)
        return later(decoder, tokens, dtype, *others)

    monkeypatch.setattr(Targets, "later", watched)
    content = recipe_for(loud_base, texts)
    short = SHORT | {"steps": 2}
    content["experts"] = [
        {"name": name, "method": "rtn", "scheme": "w4a16", "group_size": 64, "distill": short | {"precision": name}}
        for name in ("bfloat16", "float32")
    ]
    LanguageTask(moqe.parse_recipe(content), tmp_path).make_experts(Silent())
    assert used == [torch.bfloat16, torch.float32]


def test_samples_spread_over_domains() -> None:
    domain = ("a",) * 20 + ("b",) * 3 + ("c",) * 20
    samples = TextSamples(torch.zeros(43, 4, dtype=torch.int64), tuple(map(str, range(43))), domain, (1,) * 43)
    rows = samples.spread(13)
    assert len(rows) == len(set(rows)) == 13
    assert [sum(samples.domain[row] == name for row in rows) for name in "abc"] == [5, 3, 5]
    assert rows == sorted(rows)
    assert samples.spread(None) == samples.spread(100) == list(range(43))


def test_distillation_may_see_more_windows_than_the_statistics(loud_base: Path, texts: Path, tmp_path: Path) -> None:
    content = recipe_for(loud_base, texts)
    content["data"] |= {"calibration_samples": 6}
    content["experts"] = [
        {"name": "gptq", "method": "gptq", "scheme": "w4a16", "distill": SHORT | {"steps": 2, "samples": 18}}
    ]
    few = recipe_for(loud_base, texts)
    few["data"] |= {"calibration_samples": 6}
    few["experts"] = [{"name": "gptq", "method": "gptq", "scheme": "w4a16", "distill": SHORT | {"steps": 2}}]
    windows, seen = [], []
    for number, one in enumerate((content, few)):
        task = LanguageTask(moqe.parse_recipe(one), tmp_path / str(number))
        task.make_experts(Silent())
        windows.append(len(task.splits()["calibration"]))
        certificate = json.loads((tmp_path / str(number) / "experts" / "gptq" / "certificate.json").read_text())
        seen.append(certificate["layers"][0]["seen"])
    assert windows == [18, 6]
    assert seen[0] == seen[1]
