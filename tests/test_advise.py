"""Advice: what time allows, and the whole on a tiny base; test_advise_prediction.py has what losses amount to."""

from __future__ import annotations

import json
import math
import random
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from tests.conftest import WORDS

import moqe
from moqe import cli
from moqe.advice import Advice
from moqe.advice.budget import FULL, FULL_OWN, LEAST_WINDOWS, MOST_WINDOWS, Clock, Schedule, affordable_windows, plan
from moqe.advice.codes import make_codes
from moqe.advice.page import advice_renderable
from moqe.advice.prediction import doublings
from moqe.advice.samples import parse_source, read_samples
from moqe.errors import DataError, RecipeError
from moqe.formats import open_expert
from moqe.progress import Silent

QUICK: dict[str, Any] = {"bits": [2, 8], "experts": [2, 3, 8], "window": 24, "steps": 4}


def write_documents(path: Path, vocabulary: tuple[str, ...], count: int, seed: str, words: int = 36) -> None:
    source = random.Random(seed)
    lines = [json.dumps({"text": " ".join(source.choices(vocabulary, k=words))}) for _ in range(count)]
    path.write_text("".join(line + "\n" for line in lines))


@pytest.fixture(scope="module")
def domains(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two domains with words of their own, as the command line takes them."""
    folder = tmp_path_factory.mktemp("advice")
    for domain in ("code", "prose"):
        write_documents(folder / f"{domain}.jsonl", WORDS[domain], 12, domain)
    return [f"{folder / domain}.jsonl={domain}" for domain in ("code", "prose")]


@pytest.fixture(scope="module")
def found(loud_base: Path, domains: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Advice, Path]:
    """Advice, and the folder it was written to."""
    out = tmp_path_factory.mktemp("out")
    return moqe.advise(str(loud_base), domains, out=out, **QUICK), out


# The whole


def test_advice_has_a_row_per_width_and_size(found: tuple[Advice, Path]) -> None:
    advice, _ = found
    assert [(row.bits, row.experts) for row in advice.rows] == [(b, n) for b in (2, 8) for n in (2, 3, 8)]
    assert [width.bits for width in advice.widths] == [2, 8]
    assert all(row.gain.low <= row.gain.value <= row.gain.high for row in advice.rows)
    ratios = [row.memory_ratio for row in advice.rows if row.bits == 2]
    assert ratios == sorted(ratios)
    assert ratios[0] < 1.2
    assert {row.extrapolated for row in advice.rows if row.bits == 2} <= {
        ("steps",),
        ("steps", "experts"),
        ("experts",),
        (),
    }
    assert advice.sampled.labels == ("code", "prose")
    assert advice.sampled.router_accuracy > 0.9
    assert set(advice.seconds) == {"read", "codes", "base", "measure", "predict"}
    assert any("distillation: 4 steps" in cut for cut in advice.cut)


def test_nothing_is_trained_where_there_is_nothing_to_win(found: tuple[Advice, Path]) -> None:
    advice, _ = found
    two, eight = advice.widths
    assert (two.steps, two.method) == (4, "gptq")
    assert (eight.steps, eight.method) == (0, "rtn")
    assert eight.divergence < two.divergence
    assert all(row.gain.value == 0 and not row.pays_by_bandwidth for row in advice.rows if row.bits == 8)


def test_files_hold_what_was_returned(found: tuple[Advice, Path]) -> None:
    advice, out = found
    assert json.loads((out / "advice.json").read_text()) == json.loads(json.dumps(asdict(advice)))
    assert (out / "advice.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in out.iterdir()} == {"advice.json", "advice.png"}


def test_the_command_prints_json_and_a_table(
    loud_base: Path, found: tuple[Advice, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: dict[str, Any] = {}

    def answer(base: str, data: list[str], **options: Any) -> Advice:
        asked.update(options, base=base, data=data)
        return found[0]

    monkeypatch.setattr("moqe.advice.advise", answer)
    monkeypatch.setenv("COLUMNS", "120")
    words = ["moqe", "advise", str(loud_base), "--data", "a=x", "b=y", "--bits", "2", "8", "--experts", "2", "--json"]
    monkeypatch.setattr(sys, "argv", words)
    cli.main()
    content = json.loads(capsys.readouterr().out)
    assert (asked["data"], asked["bits"], asked["experts"]) == (["a=x", "b=y"], [2, 8], [2])
    assert {"sentence", "pays_by_bandwidth", "pays_by_storage", "rows", "widths", "sampled", "cut"} <= set(content)
    assert {"bits", "experts", "memory_ratio", "gain", "storage_gain", "bandwidth_gain"} <= set(content["rows"][0])
    assert set(content["rows"][0]["gain"]) == {"low", "value", "high"}
    monkeypatch.setattr(sys, "argv", [word for word in words if word != "--json"])
    cli.main()
    said = capsys.readouterr().out
    assert "For want of time" in said
    assert found[0].sentence[:40] in said


def test_equal_domains_are_not_worth_it(loud_base: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_documents(tmp_path / f"{name}.jsonl", WORDS["prose"], 12, name)
    data = [f"{tmp_path / name}.jsonl={name}" for name in ("one", "two")]
    for steps, said in ((64, "Not worth it here"), (4, "Undecided: no predicted gain stands clear of zero, but")):
        advice = moqe.advise(str(loud_base), data, bits=[3], experts=[3], window=24, steps=steps)
        assert not advice.pays_by_bandwidth
        assert not advice.pays_by_storage
        assert advice.sentence.startswith(said)


def test_what_follows_the_text_is_trained_at_every_width(loud_base: Path, domains: list[str], tmp_path: Path) -> None:
    advice = moqe.advise(
        str(loud_base), domains, out=tmp_path, text_weight=0.5, own_weight=5, **QUICK | {"experts": [3]}
    )
    assert [width.steps for width in advice.widths] == [4, 4]
    assert advice.text_weight == 0.5
    assert all(row.measured_gain == row.loss_gain for row in advice.rows)
    assert "Not worth it" not in advice.sentence
    assert advice.pays_by_bandwidth or "they had 4 steps of" in advice.sentence
    with (console := Console(width=300)).capture() as said:
        console.print(advice_renderable(advice))
    assert "the text with a weight of 0.5" in said.get()
    assert "gains are of loss" in said.get()
    assert "their own windows 5 times as often" in said.get()
    assert json.loads((tmp_path / "advice.json").read_text())["text_weight"] == 0.5


def test_one_domain_is_told_apart_by_clusters_and_a_seed_repeats_itself(loud_base: Path, domains: list[str]) -> None:
    data = [source.partition("=")[0] + "=all" for source in domains]
    options: dict[str, Any] = {"bits": [2], "experts": [3], "window": 24, "steps": 2, "seed": 3}
    first, second = (moqe.advise(str(loud_base), data, **options) for _ in range(2))
    assert first.sampled.clusters
    assert first.sampled.labels[0].startswith("cluster-")
    assert replace(first, seconds={}) == replace(second, seconds={})


def test_a_label_that_no_scored_window_has_gets_no_specialist(
    loud_base: Path, domains: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small cluster may be in the calibration windows alone."""
    from moqe.advice import run

    read = run.read_samples

    def lonely(*arguments: Any) -> Any:
        found = read(*arguments)
        label = ("lonely", *found.calibration.domain[1:])
        return replace(found, calibration=replace(found.calibration, domain=label))

    monkeypatch.setattr(run, "read_samples", lonely)
    monkeypatch.setattr(run, "routed_labels", lambda samples, tokens, embedding: np.array(["code"] * len(tokens)))
    advice = moqe.advise(str(loud_base), domains, bits=[2], experts=[5], window=24, steps=2)
    assert any("2 bits: 2 of 3 specialists" in cut for cut in advice.cut)
    assert all(math.isfinite(row.gain.value) for row in advice.rows)


def test_what_time_left_no_room_for_is_left_out_and_said(
    loud_base: Path, domains: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    left = iter([1e9, 1e9])  # before the base runs, and when training is planned
    monkeypatch.setattr(Clock, "left", property(lambda self: next(left, -1.0)))
    monkeypatch.setattr("moqe.advice.budget.LADDER", ((4, 2),))
    advice = moqe.advise(str(loud_base), domains, bits=[2, 3], experts=[2, 3], window=24)
    assert [row.bits for row in advice.rows] == [3, 3]
    assert "3 bits: 1 of 2 specialists, time was up or no text that was looked at was theirs" in advice.cut
    assert "2 bits: not measured, time was up" in advice.cut
    assert any("a build takes" in cut for cut in advice.cut)
    assert "experts" in advice.rows[1].extrapolated
    assert (advice.steps, advice.own_steps) == (4, 2)


def test_codes_are_made_of_fewer_windows_than_are_distilled_on(
    loud_base: Path, domains: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from moqe.advice import bench

    seen: dict[str, int] = {}
    make, train = bench.make_codes, bench.trained

    def spy_codes(decoder: Any, samples: Any, *rest: Any) -> Any:
        seen["codes"] = len(samples)
        return make(decoder, samples, *rest)

    def spy_training(student: Any, bits: int, method: str, data: Any, *rest: Any) -> Any:
        seen["training"] = len(data.train)
        return train(student, bits, method, data, *rest)

    monkeypatch.setattr(bench, "STATISTICS_WINDOWS", 4)
    monkeypatch.setattr(bench, "make_codes", spy_codes)
    monkeypatch.setattr(bench, "trained", spy_training)
    moqe.advise(str(loud_base), domains, bits=[2], experts=[2], window=24, steps=2)
    assert seen["codes"] == 4 < seen["training"]


@pytest.mark.parametrize("enough", [True, False])
def test_time_that_is_left_over_trains_more_specialists_than_planned(
    loud_base: Path, domains: list[str], monkeypatch: pytest.MonkeyPatch, enough: bool
) -> None:
    from moqe.advice import bench

    monkeypatch.setattr(bench, "plan", lambda *arguments: Schedule(4, 2, 1))
    monkeypatch.setattr(Clock, "left", property(lambda self: 1e9))
    monkeypatch.setattr(bench, "_SPARE", 1.2 if enough else math.inf)
    advice = moqe.advise(str(loud_base), domains, bits=[2, 3], experts=[2, 3], window=24)
    said = [cut for cut in advice.cut if "specialists" in cut and "steps" not in cut]
    left_behind = "3 bits: 1 of 2 specialists, time was up or no text that was looked at was theirs"
    assert said == ([left_behind] if enough else ["specialists: 1 of 2"])
    extrapolated = {row.bits: "experts" in row.extrapolated for row in advice.rows if row.experts == 3}
    assert extrapolated == {3: True, 2: not enough}  # only the last width, whose time nobody else needs


@pytest.mark.parametrize("label", ["code", "prose"])
def test_the_label_that_promises_most_gets_a_specialist_first(
    loud_base: Path, domains: list[str], monkeypatch: pytest.MonkeyPatch, label: str
) -> None:
    from moqe.advice import bench, measurement

    names: list[str] = []
    distill = measurement.distill
    monkeypatch.setattr(bench, "plan", lambda *arguments: Schedule(4, 2, 1))
    monkeypatch.setattr(bench, "_SPARE", math.inf)
    monkeypatch.setattr(measurement, "promise", lambda scored, *scores: (scored.label == label).astype(float))
    monkeypatch.setattr(measurement, "distill", lambda *a, name, **k: names.append(name) or distill(*a, name=name, **k))
    moqe.advise(str(loud_base), domains, bits=[2], experts=[3], window=24)
    assert names == ["w2", f"w2 for {label}"]


def test_codes_that_take_too_long_get_grids_that_are_not_searched(loud_base: Path, domains: list[str]) -> None:
    from moqe.models.decoder import Decoder

    decoder = Decoder.open(str(loud_base))
    sources = [parse_source(source) for source in domains]
    calibration = read_samples(sources, decoder.tokenizer, 24, (8, 8, 8), 0, Silent()).calibration
    with tempfile.TemporaryDirectory() as work:
        codes = make_codes(decoder, calibration, [3, 8], Path(work) / "c", Path(work) / "s", 1e-6, Silent())
        assert codes.methods == {3: "gptq-minmax", 8: "rtn"}
        assert "min-max grids" in codes.cut
        assert open_expert(codes.folders[3]).names()


# Errors


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"bits": [5]}, "no integer scheme has 5 bits: choose from 2, 3, 4, 8"),
        ({"bits": []}, "no bits"),
        ({"experts": [1]}, "2 experts or more"),
        ({"minutes": 0}, "minutes must be above 0"),
        ({"window": 8}, "window must be 16"),
        ({"steps": 1}, "steps must be 2 or more"),
        ({"own_weight": 1.0}, "own_weight must be above 1"),
        ({"text_weight": 1.0}, "text_weight must be at least 0 and below 1"),
    ],
)
def test_options_that_cannot_be(loud_base: Path, domains: list[str], change: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        moqe.advise(str(loud_base), domains, **(QUICK | change))


def test_too_few_documents(loud_base: Path, tmp_path: Path) -> None:
    write_documents(tmp_path / "few.jsonl", WORDS["prose"], 5, "few")
    with pytest.raises(DataError, match="'few' has 5 documents, and advice needs 6"):
        moqe.advise(str(loud_base), [f"{tmp_path / 'few.jsonl'}=few"], **QUICK)
    write_documents(tmp_path / "some.jsonl", WORDS["prose"], 6, "some")
    with pytest.raises(DataError, match="2 documents to judge on are too few"):
        moqe.advise(str(loud_base), [f"{tmp_path / 'some.jsonl'}=some"], **QUICK)
    with pytest.raises(DataError, match="shorter window"):
        moqe.advise(str(loud_base), [f"{tmp_path / 'some.jsonl'}=some"], **(QUICK | {"window": 2000}))
    with pytest.raises(RecipeError, match="no data"):
        moqe.advise(str(loud_base), [], **QUICK)


def test_a_source_is_a_path_and_perhaps_a_domain(tmp_path: Path) -> None:
    assert parse_source("a/b.jsonl=code").label == "code"
    assert parse_source("a/b.jsonl").label == "a/b.jsonl"
    (tmp_path / "a=b.txt").write_text("x")
    assert parse_source(str(tmp_path / "a=b.txt")).path == str(tmp_path / "a=b.txt")


def test_roles_share_no_document(loud_base: Path, domains: list[str]) -> None:
    from moqe.models.decoder import Decoder

    sources = [parse_source(source) for source in domains]
    samples = read_samples(sources, Decoder.open(str(loud_base)).tokenizer, 24, MOST_WINDOWS, 0, Silent())
    roles = [set(part.document) for part in (samples.calibration, samples.choice, samples.judging)]
    assert all(roles)
    assert not roles[0] & roles[1]
    assert not roles[0] & roles[2]
    assert not roles[1] & roles[2]
    assert samples.scored.document == samples.choice.document + samples.judging.document


# What time allows


def test_with_time_enough_the_training_is_a_build_s() -> None:
    assert plan(1e9, 3, 5, 100, 1.0, 1.0) == Schedule(FULL.steps, FULL.branch_after, 5)
    assert not Schedule(FULL.steps, FULL.branch_after, 5).extrapolates
    assert doublings(FULL_OWN, FULL_OWN) == 0


@pytest.mark.parametrize("seconds", [1.0, 100.0, 300.0, 1000.0, 5000.0])
def test_a_plan_fits_or_is_the_smallest(seconds: float) -> None:
    found = plan(seconds, 3, 5, 40, 0.5, 0.1)
    fits = 3 * found.seconds(0.5, 0.1, 40) <= seconds
    assert fits or (found.steps, found.specialists) == (8, 1)


def test_more_time_never_trains_less() -> None:
    plans = [plan(seconds, 3, 5, 40, 0.5, 0.1) for seconds in range(50, 3000, 50)]
    own = [one.own_steps * one.specialists for one in plans]
    assert own[0] < own[-1]
    assert [one.steps for one in plans] == sorted(one.steps for one in plans) or own == sorted(own)
    assert plan(0.1, 1, 1, 10, 1.0, 1.0, steps=7) == Schedule(7, 0, 1)


def test_windows_follow_the_time() -> None:
    assert affordable_windows(1e9, 0.1, 3, (900, 500, 500)) == MOST_WINDOWS
    assert affordable_windows(1.0, 10.0, 3, (500, 500, 500)) == LEAST_WINDOWS
    assert affordable_windows(1e9, 0.1, 3, (5, 6, 7)) == (5, 6, 7)
