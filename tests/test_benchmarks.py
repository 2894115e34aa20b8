"""What benchmarks compute before they print: ratios with their spread, and the sentences of the specialists' tables."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from benchmarks.advice import prediction_path
from benchmarks.advice import section as advice_section
from benchmarks.interleaved import Spread, pairwise, ratios, seconds_per_round
from benchmarks.latency_language import open_contestant
from benchmarks.mixture_perplexity import losses, read_windows
from benchmarks.own_process import RuntimeProcess
from benchmarks.server_perplexity import compare
from benchmarks.specialists_runs import keep, read_kept, take_over
from benchmarks.specialists_tables import BEST, GENERALIST, LABEL, MIXTURE, claim, pooled, prompts, section, sections
from benchmarks.tables import write_section

import moqe
from moqe.bundled import bundled_model
from moqe.data.splits import make_splits
from moqe.mixture import LanguageMixture
from moqe.models.decoder import Decoder
from moqe.progress import Silent
from moqe.recipe import Recipe, parse_recipe
from moqe.runtimes.reference import ReferenceRuntime
from moqe.store import write_json

PROTOCOL = "prefix-64"
WINDOWS = 30


def outcome(seed: int, mixture_gain: float, label_gain: float) -> dict[str, Any]:
    """What a run keeps where the mixture and the label win that much on every window, half of them of one domain."""
    general = np.random.default_rng(seed).uniform(100.0, 200.0, WINDOWS)
    ways = {
        GENERALIST: general,
        "gptq": general + 10.0,
        "base": general - 10.0,
        "for-code": general + 1.0,
        BEST: general,
        MIXTURE: general - 50 * mixture_gain,
        LABEL: general - 50 * label_gain,
    }
    facts = {
        "document": [f"{seed // 2}:{window // 2}" for window in range(WINDOWS)],  # seeds 0 and 1 share theirs
        "domain": ["code", "mail"] * (WINDOWS // 2),
        "count": [50] * WINDOWS,
        "ways": {name: values.tolist() for name, values in ways.items()},
        BEST: GENERALIST,
    }
    return {
        "seed": seed,
        "conditions": {"runtime": "bfloat16", "steps": 64, "specialists": ["code", "mail"]},
        "bytes": {"one": 100, "family": 108},
        "made": {},
        "protocols": {"prefix-64": facts, "whole": facts},
    }


def test_a_median_has_an_interval_around_it() -> None:
    values = [1.0, 1.1, 0.9, 1.05, 0.95, 1.2, 0.8]
    found = Spread.of_median(values)
    assert found.median == 1.0
    assert 0.8 <= found.lowest < 1.0 < found.highest <= 1.2
    assert Spread.of_median([2.0] * 5) == Spread(2.0, 2.0, 2.0)
    assert Spread.of_median(values * 20).highest - Spread.of_median(values * 20).lowest < found.highest - found.lowest


def test_ratios_are_made_within_rounds() -> None:
    assert pairwise([2.0, 30.0], [1.0, 10.0]) == [2.0, 3.0]
    assert ratios([2.0, 30.0, 8.0], [1.0, 10.0, 2.0]) == Spread(3.0, 2.0, 4.0)


def test_contestants_take_turns_in_both_directions() -> None:
    called: list[str] = []
    seconds = seconds_per_round({name: lambda name=name: called.append(name) for name in "ab"}, 2, 0.0)  # type: ignore[misc]
    assert "".join(called) == "aabb" + "ab" + "ba"
    assert {name: len(found) for name, found in seconds.items()} == {"a": 2, "b": 2}


def test_a_contestant_answers_from_a_process_of_its_own(capfd: pytest.CaptureFixture[str]) -> None:
    base, prompt = bundled_model("tiny-qwen3"), torch.arange(5, 12)[None]
    expected = ReferenceRuntime(Decoder.open(str(base)).full()).generate(prompt, 6)
    with RuntimeProcess(partial(open_contestant, "float32", base, base), threads=1) as process:
        assert process.generate(prompt, 6) == expected
        assert process.generate(prompt, 2) == expected[:2]
    with (
        RuntimeProcess(partial(open_contestant, "float32", base / "absent", base), threads=1) as process,
        pytest.raises(RuntimeError, match="ended without an answer"),
    ):
        process.generate(prompt, 1)
    assert "absent" in capfd.readouterr().err


def test_a_mixture_is_scored_on_its_own_test_windows_or_on_a_text(built: Path, tmp_path: Path) -> None:
    mixture = moqe.load(built)
    assert isinstance(mixture, LanguageMixture)
    test = make_splits(mixture.recipe.data, mixture.tokenizer, mixture.recipe.seed, Silent()).test.tokens
    assert torch.equal(read_windows(mixture, None, 3, 99), test[[0, len(test) // 3, 2 * len(test) // 3]])
    with pytest.raises(SystemExit, match=f"has {len(test)} test windows"):
        read_windows(mixture, None, len(test) + 1, 99)
    text = tmp_path / "text"
    text.write_text("the river and the sea " * 9)
    windows = read_windows(mixture, text, 2, 8)
    assert windows.flatten().tolist() == mixture.tokenizer(text.read_text())["input_ids"][:16]
    with pytest.raises(SystemExit, match="tokens and 4096 are asked for"):
        read_windows(mixture, text, 2, 2048)
    found = losses(mixture, windows)
    assert list(found) == ["mixture", *mixture.experts]
    pinned = [float(mixture.runtime("gptq").score(window[None]).mean()) for window in windows]
    assert found["gptq"] == pytest.approx(sum(pinned) / 2, rel=1e-6)
    assert found["mixture"] == pytest.approx(sum(mixture.score(window).nats for window in windows) / 14, rel=1e-9)


def test_a_server_is_compared_with_the_expert_that_it_serves(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mixture = moqe.load(built)
    assert isinstance(mixture, LanguageMixture)
    first, other = (mixture.runtime(name) for name in mixture.experts[:2])
    expected = first.generate(torch.tensor([[7, 11, 13]]), 6)
    monkeypatch.setattr(other, "generate", lambda prompt, new: [-1, *expected[1:new]])
    monkeypatch.setattr(first, "generate", lambda prompt, new: expected[:new])
    windows = make_splits(mixture.recipe.data, mixture.tokenizer, mixture.recipe.seed, Silent()).test.tokens[:3]
    found = compare({"first": first, "again": first, "other": other}, windows, 6)
    ratio = float(other.score(windows).double().mean() - first.score(windows).double().mean())
    assert found["first"] == found["again"] == (1.0, 6)
    assert found["other"] == (pytest.approx(np.exp(ratio)), 5)
    assert ratio != 0.0


@pytest.mark.parametrize(
    ("gain", "said"),
    [
        (0.02, "The mixture wins: +0.0200 nats against the best single expert; at least the 0.008 aimed at; 80 %"),
        (0.004, "The mixture wins: +0.0040 nats against the best single expert; less than the 0.008 aimed at; 16 %"),
        (-0.01, "The mixture does not win: -0.0100 nats against the best single expert; less than the 0.008"),
    ],
)
def test_the_claim_says_what_the_numbers_say(gain: float, said: str) -> None:
    ways, document, count, _ = pooled([outcome(0, gain, 0.025)], PROTOCOL)
    assert claim(ways, document, count, 4).startswith(said)


def test_seeds_are_pooled_and_a_document_of_both_is_one() -> None:
    runs = [outcome(0, 0.01, 0.02), outcome(1, 0.03, 0.02)]
    ways, document, count, domain = pooled(runs, PROTOCOL)
    assert len(document) == len(count) == len(domain) == 2 * WINDOWS
    assert len(set(document)) == WINDOWS / 2
    assert claim(ways, document, count, 4).startswith("The mixture wins: +0.0200")
    text = section(4, "codes", runs, "")
    assert f"{2 * WINDOWS} windows, 2 seeds" in text
    assert "1.080 times the bytes of one expert" in text
    assert "nats against gptq, 50 % of its loss against the base" in text


def test_runs_made_otherwise_are_not_pooled_or_paired() -> None:
    runs = [outcome(0, 0.01, 0.02), outcome(1, 0.03, 0.02)]
    assert "Options: runtime bfloat16; specialists code, mail; steps 64." in section(4, "codes", runs, "")
    runs[1]["conditions"] |= {"steps": 120}
    with pytest.raises(SystemExit, match="seeds 0, 1 were run with different options"):
        section(4, "codes", runs, "")
    plain, clusters = outcome(0, 0.02, 0.03), outcome(0, 0.01, 0.02)
    plain["conditions"] |= {"runtime": "reference"}
    assert "specialists: text |" not in sections({"4-text": [plain], "4-text+clusters": [clusters]})["4-text+clusters"]


def test_what_clusters_and_rounds_did_is_listed() -> None:
    run = outcome(0, 0.01, 0.02)
    run["made"] = {
        "generalist": {"rounds": [{"round": 1, "before": 0.5, "after": 0.4}]},
        "for-cluster-1": {"own": {"windows": 7, "words": ["def", "self"]}},
    }
    found = sections({f"4-{kind}": [copy.deepcopy(run)] for kind in ("text+clusters", "rounds")})
    assert set(found) == {"4-text+clusters", "4-rounds"}
    assert "| for-cluster-1 | 0 | 7 | `def`, `self` |" in found["4-text+clusters"]
    assert "follows base and text" in found["4-text+clusters"]
    assert "0.5000 → 0.4000" in found["4-rounds"]
    assert "router mixture" in found["4-rounds"]
    run["made"]["generalist"]["rounds"][0]["after"] = 0.5
    undone = sections({"4-rounds": [run]})["4-rounds"]
    assert "0.5000 → 0.5000" in undone
    assert "No round was kept" in undone
    assert "router mixture" not in undone


def test_shorter_prompts_are_pooled_over_seeds_and_show_the_worst_unknown_domain() -> None:
    def entry(nats: float, share: float) -> dict[str, Any]:
        windows = {"count": [50] * 4, "document": ["a", "a", "b", "b"]}
        return windows | {"tokens": {"64": {"loss": [50 * nats] * 4, "generalist": share}}}

    runs = [
        {"prompts": {"known": entry(known, 0.25), "unknown": {"code": entry(0.001, 0.5), "mail": entry(mail, share)}}}
        for known, mail, share in ((-0.02, 0.003, 0.5), (-0.01, 0.005, 0.7))
    ]
    row = prompts(runs).splitlines()[-1]
    assert "\N{MINUS SIGN}0.0150" in row
    assert "| 25 % |" in row
    assert "mail +0.0040" in row
    assert "| 60 % |" in row
    assert "code" not in row


def test_variants_stand_beside_specialists_by_domain_on_the_same_windows() -> None:
    plain, clusters = outcome(0, 0.02, 0.03), outcome(0, 0.01, 0.02)
    other = outcome(2, 0.01, 0.02)  # of other windows
    found = sections({"4-text": [plain], "4-text+clusters": [clusters], "4-text+none": [other]})
    assert "router mixture, specialists: text" in found["4-text+clusters"]
    assert "domain label, specialists: text" in found["4-text+clusters"]
    assert "specialists: text |" not in found["4-text"]
    assert "specialists: text |" not in found["4-text+none"]


def test_a_run_keeps_what_its_tables_need(tmp_path: Path) -> None:
    for seed in (1, 0):
        run, folder = outcome(seed, 0.01, 0.02), tmp_path / "work" / f"seed-{seed}"
        run["made"] = {"generalist": {"rounds": [{"round": 1, "before": 0.0123456789, "after": 0.01}]}}
        write_json(folder / "outcomes.json", run)
        write_json(folder / "memory.json", [{"memory": 1.5, "loss": [1.0]}])
        keep(folder, tmp_path / "kept", "4-codes", {"steps": 64})
    (tmp_path / "kept" / "4-matched").mkdir()
    found = read_kept(tmp_path / "kept")
    assert list(found) == ["4-codes"]
    assert [run["seed"] for run in found["4-codes"]] == [0, 1]
    kept, first = found["4-codes"][0], outcome(0, 0.01, 0.02)
    assert kept["conditions"] == {"steps": 64}
    assert kept["memory"] == [{"memory": 1.5, "loss": [1.0]}]
    assert kept["made"]["generalist"]["rounds"][0]["before"] == 0.0123457
    ways, exact = (one["protocols"][PROTOCOL]["ways"][MIXTURE] for one in (kept, first))
    assert ways == pytest.approx(exact, abs=5e-4)
    assert ways != exact


def test_advice_stands_beside_what_was_kept(tmp_path: Path) -> None:
    for kind, seed in (("4-codes", 0), ("4-text", 1)):
        write_json(tmp_path / "run" / "outcomes.json", outcome(seed, 0.01, 0.02))
        keep(tmp_path / "run", tmp_path, kind, {})
    gain = {"value": 0.015, "low": 0.01, "high": 0.02}
    write_json(prediction_path(tmp_path, "4-text", 1), {"row": {"gain": gain, "experts": 2}, "minutes": 9.96})
    (line,) = [line for line in advice_section(tmp_path).splitlines() if line.startswith("| 4 |")]
    assert line.startswith("| 4 | text | 1 | 2 | 10.0 | +0.0150 [+0.0100, +0.0200] | +0.0100 [")
    assert line.count("| 1.50 |") == 2


def test_a_run_takes_over_what_is_the_same(tmp_path: Path) -> None:
    def recipe(**changes: Any) -> Recipe:
        source = [{"path": "a.jsonl", "domain": "a"}, {"path": "b.jsonl", "domain": "b"}]
        gptq = {"method": "gptq", "scheme": "w4a16", "group_size": 64}
        family = {"own_weight": 4.0, "distill": {"steps": 8, "branch_after": 2}} | changes.pop("specialists", {})
        content = {
            "base": "base",
            "data": {"calibration": source, "router": source, "test": source},
            "experts": [{"name": "gptq", **gptq}, {"name": "narrow", **gptq, "scheme": "w3a16"}],
            "specialists": family,
        }
        return parse_recipe(content | changes)

    def written(folder: Path) -> set[str]:
        return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - {"recipe.json"}

    first = tmp_path / "4-text" / "first"
    assert take_over(recipe(), first, tmp_path) == []
    always = {"scores/parts/base-test-00000.parquet"}
    plain = {"experts/gptq/certificate.json", "scores/parts/gptq-test-00000.parquet", "shared/config.json"}
    codes = {".work/quantized/generalist/a", ".work/records/generalist/b"}
    general = codes | {"scores/parts/generalist-test-00000.parquet"}
    trained = {".work/distill/for-a/round-0/own-4/training.safetensors"}
    mine = {
        "experts/generalist/certificate.json",
        "scores/parts/for-a-test-00000.parquet",
        "experts/for-a/certificate.json",
    }
    for name in always | plain | general | trained | mine | {".work/distill/for-a/round-1/own-4/training.safetensors"}:
        (first / name).parent.mkdir(parents=True, exist_ok=True)
        (first / name).write_text(name)

    cases = {
        "rounds": (recipe(specialists={"rounds": 2}), always | plain | general | trained),
        "weights": (recipe(specialists={"own_weight": 8.0}), always | plain | general),
        "steps": (recipe(specialists={"distill": {"steps": 9}}), always | plain | codes),
        "clusters": (recipe(specialists={"by": "cluster", "count": 2}), always | plain | codes),
        "more clusters": (recipe(specialists={"by": "cluster", "count": 3}), always | plain | codes),
        "seed": (recipe(seed=1), set()),
    }
    for name, (changed, expected) in cases.items():
        folder = tmp_path / "4-other" / name
        said = take_over(changed, folder, tmp_path)
        assert written(folder) == expected, name
        assert bool(said) == bool(expected)
        if name == "clusters":  # what two clusters were trained for is of no use to three
            (folder / ".work/distill/for-cluster-1/round-0").mkdir(parents=True)
            (folder / ".work/distill/for-cluster-1/round-0/clusters").write_text(name)
    assert (tmp_path / "4-other" / "rounds" / "shared" / "config.json").samefile(first / "shared" / "config.json")


def test_a_section_is_replaced_and_the_rest_left(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n\n<!-- a -->\nold\n<!-- /a -->\n\nafter\n")
    write_section(page, "a", "new")
    write_section(page, "b", "more")
    assert page.read_text() == ("before\n\n<!-- a -->\nnew\n<!-- /a -->\n\nafter\n\n<!-- b -->\nmore\n<!-- /b -->\n")
