"""The verdict on images in the terminal, on the card and in the report."""

import base64
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from rich.console import Console

from moqe.evaluate import judge, read_verdict, write_verdict
from moqe.evaluate.card import render_card
from moqe.evaluate.contact import contact_sheet
from moqe.evaluate.context import CandidateRow, ReportContext
from moqe.evaluate.metrics import METRICS
from moqe.evaluate.outcome import cascaded, routed
from moqe.evaluate.report import render_report
from moqe.evaluate.telling import ROOM, omission, telling
from moqe.evaluate.terminal import verdict_renderable
from moqe.evaluate.verdict import ExpertSummary, Verdict
from moqe.router import Cascade

HOSTILE = "<script>alert('x')</script> & | `co`"
PNG = b"\x89PNG\r\n\x1a\n"
Made = Callable[..., tuple[Verdict, ReportContext]]


@pytest.fixture
def make(simulated_images: Callable[..., Any]) -> Made:
    def made(classes: int = 6, n: int = 300, threshold: float = 0.5, first: str = "") -> tuple[Verdict, ReportContext]:
        images = simulated_images(0, n=n, classes=classes)
        names = (first or images.classes[0], *images.classes[1:])
        label = images.predictions.label
        tables = {name: replace(table, domain=np.asarray(names)[label]) for name, table in images.tables.items()}
        choice = label % 3
        answer = Cascade(threshold, (1, 2, 0)).answer(
            torch.from_numpy(choice), torch.from_numpy(images.predictions.probabilities)
        )
        route, cascade = routed(tables, choice), cascaded(tables, images.predictions, answer)
        outcomes = {"mixture": cascade, "route": route, "cascade": cascade, "constant": routed(tables, 0 * choice)}
        predicted = tables["cross_entropy"].loss
        found = judge(tables, tables["top1"], outcomes, 0, 100, predicted=predicted, policy="cascade")
        experts = {name: ExpertSummary(name, "w4a4", 20_000, 0.0, 4.25) for name in images.predictions.experts}
        verdict = Verdict(
            "0123456789abcdef", "top1", "whole", {"whole": found}, experts, 80_000, 60_000, 0, 100,
            also=["top5", "cross_entropy"], router_metric="cross_entropy",
        )  # fmt: skip
        context = ReportContext(
            base="timm:resnet10t",
            recipe_yaml="base: timm:resnet10t\n",
            candidates={"whole": (CandidateRow("linear", 0.9312, 0.0041, 0.0022, True),)},
            guards={"whole": ""},
            substitutions=(),
            contact=contact_sheet(images.predictions, cascade, names, lambda row: PNG),
        )
        return verdict, context

    return made


def terminal(verdict: Verdict, width: int = 80) -> str:
    target = StringIO()
    Console(file=target, width=width).print(verdict_renderable(verdict))
    return target.getvalue()


def test_the_report_holds_the_pictures(make: Made) -> None:
    verdict, context = make()
    page = render_report(verdict, context)
    root = ElementTree.fromstring(page.removeprefix("<!DOCTYPE html>\n"))
    images = [one for one in root.iter() if one.tag.split("}")[-1] == "img"]
    assert len(images) == 24
    address = "data:image/png;base64," + base64.b64encode(PNG).decode()
    assert {one.attrib["src"] for one in images} == {address}
    assert all(one.attrib["alt"].startswith("class ") for one in images)
    text = " ".join(" ".join(root.itertext()).split())
    assert context.contact is not None
    assert f"{context.contact.disagreements} of 300 test images; 24 of them" in text
    assert "\N{CHECK MARK} class" in text
    assert "\N{BALLOT X} class" in text


def test_accuracies_costs_and_other_metrics_stand_everywhere(make: Made) -> None:
    verdict, context = make()
    found = verdict.headline
    accuracy, cost = f"{100 * found.mixture.value:.2f}", f"{found.cost:.3f}"
    assert cost not in ("1.000", "2.000")
    mixture = next(line for line in found.lines if line.kind == "mixture")
    entropy = f"{mixture.also['cross_entropy']:.4f}"
    for page in (render_report(verdict, context), render_card(verdict, context), terminal(verdict)):
        for wanted in (accuracy, cost, entropy, "cascade", "points of top-1 accuracy", "class 3"):
            assert wanted in " ".join(page.split())
        for unwanted in ("perplexity", "PPL", "bits per byte", "tokens", "split-half", "Wilcoxon"):
            assert unwanted not in page
    for page in (render_report(verdict, context), render_card(verdict, context)):
        assert "93.12" in page  # a router's accuracy, where texts show nats
        assert "+0.41" in page


def test_the_terminal_keeps_within_80_columns(make: Made) -> None:
    shown = terminal(make()[0])
    assert max(len(line) for line in shown.splitlines()) <= 80
    rows = {line.split()[0]: line.split() for line in shown.splitlines() if line.strip()}
    assert rows["oracle"][-1] == "3"
    assert "300 images" in shown


def test_shares_of_a_cascade_are_more_than_everything(make: Made) -> None:
    verdict, context = make(threshold=1.0)
    assert sum(verdict.headline.mixture.share.values()) == pytest.approx(2.0)
    page = render_report(verdict, context)
    assert page.count("2 forward passes per image") == 1


def test_with_many_classes_the_telling_ones_are_shown(make: Made) -> None:
    verdict, context = make(classes=30, n=400)
    rows = verdict.headline.domains
    shown = telling(rows, METRICS["top1"])
    assert len(rows) == 30
    assert len(shown) == ROOM
    changes = sorted(row.difference.value * row.n_samples for row in rows)
    kept = sorted(row.difference.value * row.n_samples for row in shown)
    assert kept == [*changes[: ROOM // 2], *changes[-ROOM // 2 :]]
    assert omission(rows, METRICS["top1"]) == "the 12 of 30 classes that gain or lose most"
    assert omission(shown, METRICS["top1"]) == ""
    left_out = next(row.domain for row in rows if row not in shown)
    for page in (terminal(verdict), render_card(verdict, context)):
        assert "the 12 of 30 classes" in " ".join(page.split())
        assert not any(line.lstrip("| ").startswith(f"{left_out} ") for line in page.splitlines())
    assert f'<th scope="row">{left_out}</th>' in render_report(verdict, context)


def test_class_names_cannot_break_out_of_the_page(make: Made) -> None:
    verdict, context = make(first=HOSTILE)
    page = render_report(verdict, context)
    assert "<script" not in page
    assert ElementTree.fromstring(page.removeprefix("<!DOCTYPE html>\n")).find(".//script") is None
    row = next(line for line in render_card(verdict, context).splitlines() if "script" in line)
    assert "<script" not in row
    assert row.replace("\\|", "").count("|") == 11


def test_a_verdict_on_images_survives_the_disk(make: Made, tmp_path: Path) -> None:
    verdict, context = make()
    write_verdict(tmp_path / "verdict.json", verdict)
    stored = read_verdict(tmp_path / "verdict.json")
    assert stored == verdict
    assert render_report(stored, context) == render_report(verdict, context)
    assert render_card(stored, context) == render_card(verdict, context)
