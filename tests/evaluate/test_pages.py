from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from rich.console import Console, RenderableType

from moqe.evaluate import read_verdict, write_verdict
from moqe.evaluate.card import render_card
from moqe.evaluate.context import CandidateRow, DistilledRow, ReportContext, Substitution
from moqe.evaluate.loss_table import LossTable
from moqe.evaluate.metrics import METRICS
from moqe.evaluate.plots import curve_plot, difference_plot, share_plot
from moqe.evaluate.report import render_report
from moqe.evaluate.terminal import inspection_table, plan_table, verdict_renderable
from moqe.evaluate.verdict import ExpertSummary, ProtocolVerdict, Verdict

HOSTILE = "<script>alert('x')</script> & | `co`\n$de$ --"
NATS = METRICS["nats_per_token"]
CONTEXT = ReportContext(
    base="somebody/model",
    recipe_yaml="base: somebody/model\nexperts: []\n",
    candidates={"whole": (CandidateRow("linear", 3.1, 0.01, 0.004, True), CandidateRow("knn", 3.2, 0.0, None, False))},
    guards={"whole": "The guard kept the router."},
    substitutions=(Substitution("rtn", "model.layers.0.mlp.up_proj.weight", "rows of 100 do not fit"),),
)


@pytest.fixture
def make_verdict(
    simulated: Callable[..., LossTable],
    domain_choice: Callable[[LossTable], np.ndarray],
    judged: Callable[..., ProtocolVerdict],
) -> Callable[..., Verdict]:
    def make(
        signal: float = 0.1, domains: tuple[str, ...] = ("code", "prose"), metric: str = "nats_per_token"
    ) -> Verdict:
        protocols = {}
        for name in ("whole", "prefix-64"):
            test = simulated(0, signal=signal, domains=domains, protocol=name, metric=metric)
            choices = {
                "mixture": domain_choice(test),
                "linear": np.arange(len(test)) % 3,
                "constant": np.zeros(len(test), np.int64),
            }
            protocols[name] = judged(test, test, choices, 0, 100, predicted=test.mean)
        experts = {name: ExpertSummary(name, "w4a16", 2_000_000, 0.1, 4.25) for name in ("awq", "gptq", "rtn")}
        return Verdict("0123456789abcdef", metric, "prefix-64", protocols, experts, 8_000_000, 5_000_000, 0, 100)

    return make


def parsed(page: str) -> ElementTree.Element:
    assert page.startswith("<!DOCTYPE html>\n")
    return ElementTree.fromstring(page.removeprefix("<!DOCTYPE html>\n"))


def test_the_report_is_well_formed_and_needs_nothing_from_elsewhere(make_verdict: Callable[..., Verdict]) -> None:
    page = render_report(make_verdict(), CONTEXT)
    root = parsed(page)
    assert len([one for one in root.iter() if one.tag.endswith("}svg")]) == 6
    for element in root.iter():
        for name, value in element.attrib.items():
            if name.split("}")[-1] in ("src", "href"):
                assert value.startswith("#")
    assert "@import" not in page
    assert "url(http" not in page
    text = " ".join(root.itertext())
    for wanted in (
        "Win.",
        "wins by",
        "split-half oracle",
        "0123456789abcdef",
        "rows of 100 do not fit",
        "base: somebody",
    ):
        assert wanted in text


def test_ids_are_unique_and_references_resolve(make_verdict: Callable[..., Verdict]) -> None:
    root = parsed(render_report(make_verdict(), CONTEXT))
    ids = [element.attrib["id"] for element in root.iter() if "id" in element.attrib]
    assert len(ids) == len(set(ids))
    references = [
        value[1:]
        for element in root.iter()
        for name, value in element.attrib.items()
        if name.endswith("href") and value.startswith("#")
    ]
    assert references
    assert set(references) <= set(ids)


def test_names_cannot_break_out_of_the_page(make_verdict: Callable[..., Verdict]) -> None:
    verdict = make_verdict(domains=(HOSTILE, "prose"))
    context = replace(
        CONTEXT, base=HOSTILE, recipe_yaml=HOSTILE, substitutions=(Substitution(HOSTILE, HOSTILE, HOSTILE),)
    )
    page = render_report(verdict, context)
    assert "<script" not in page
    root = parsed(page)
    assert root.find(".//script") is None
    card = render_card(verdict, context)
    assert "<script" not in card.split("## Recipe")[0].split("---\n", 2)[2]
    rows = [line for line in card.splitlines() if line.startswith("| ") and "script" in line]
    assert rows
    assert all(row.replace("\\|", "").count("|") == 11 for row in rows if "60" in row)


def test_pages_are_equal_byte_for_byte_and_from_disk(make_verdict: Callable[..., Verdict], tmp_path: Path) -> None:
    write_verdict(tmp_path / "verdict.json", make_verdict())
    stored = read_verdict(tmp_path / "verdict.json")
    assert render_report(make_verdict(), CONTEXT) == render_report(stored, CONTEXT)
    assert render_card(make_verdict(), CONTEXT) == render_card(stored, CONTEXT)


def test_plots_carry_no_fixed_colours_so_that_dark_pages_can_set_them(make_verdict: Callable[..., Verdict]) -> None:
    found = make_verdict().headline
    assert found.curve is not None
    for plot in (difference_plot(found, NATS), share_plot(found, NATS), curve_plot(found, found.curve, NATS)):
        ElementTree.fromstring(plot)
        assert "#0000" not in plot
        assert "var(--" in plot
        assert "<title>" in plot
        assert "Date" not in plot


def test_a_page_without_a_win_says_so_everywhere(make_verdict: Callable[..., Verdict]) -> None:
    verdict = make_verdict(signal=0.0)
    terminal = StringIO()
    Console(file=terminal, width=100).print(verdict_renderable(verdict))
    for page in (render_report(verdict, CONTEXT), render_card(verdict, CONTEXT), terminal.getvalue()):
        assert "does not win here" in " ".join(page.split())
        assert "wins by" not in page


def test_every_page_says_that_experts_were_trained_on_the_text(make_verdict: Callable[..., Verdict]) -> None:
    plain = make_verdict()
    adapted = replace(plain, text_weight=0.5)
    row = DistilledRow("gptq", "", 3.0, 2.5, 8, 8, 0, (), None, text_weight=0.5)
    for verdict, context in ((plain, CONTEXT), (adapted, replace(CONTEXT, distilled=(row,)))):
        terminal = StringIO()
        Console(file=terminal, width=80).print(verdict_renderable(verdict))
        pages = (terminal.getvalue(), render_card(verdict, context), render_report(verdict, context))
        found = ["the base could be adapted as well" in " ".join(page.split()) for page in pages]
        assert found == [verdict is adapted] * 3
    assert "(share 0.50)" in render_report(adapted, replace(CONTEXT, distilled=(row,)))
    parsed(render_report(adapted, replace(CONTEXT, distilled=(row,))))


def test_the_terminal_shows_every_line_within_80_columns(make_verdict: Callable[..., Verdict]) -> None:
    target = StringIO()
    Console(file=target, width=80).print(verdict_renderable(make_verdict(domains=("[red]code", "prose"))))
    shown = target.getvalue()
    for wanted in (
        "prefix-64",
        "whole",
        "base",
        "awq",
        "mixture",
        "constant",
        "random",
        "uniform",
        "oracle",
        "[red]code",
    ):
        assert wanted in shown
    assert shown.count("[red]code") == 4
    lines = shown.splitlines()
    assert max(len(line) for line in lines) <= 80
    (_, *header), *_ = [line.split() for line in lines if "PPL" in line]
    assert header[-2:] == ["PPL", "cost"]
    assert [line.split()[-1] for line in lines if line.startswith(" oracle ")] == ["3", "oracle", "3", "oracle"]


def test_accuracy_has_no_perplexity(make_verdict: Callable[..., Verdict]) -> None:
    verdict = make_verdict(metric="top1")
    target = StringIO()
    Console(file=target, width=100).print(verdict_renderable(verdict))
    for page in (render_report(verdict, CONTEXT), render_card(verdict, CONTEXT), target.getvalue()):
        assert "perplexity" not in page
        assert "PPL" not in page


def test_a_single_expert_can_be_reported(
    by_hand: Callable[..., LossTable], judged: Callable[..., ProtocolVerdict]
) -> None:
    test = by_hand([[20.0]] * 8, [19.0] * 8, experts=("only",))
    found = judged(test, test, {"mixture": np.zeros(8, np.int64)}, 0, 100)
    expert = ExpertSummary("rtn", "w8a16", 1, 0.0)
    verdict = Verdict("0" * 16, "nats_per_token", "whole", {"whole": found}, {"only": expert}, 2, 1, 0, 100)
    parsed(render_report(verdict, CONTEXT))
    assert "every sample goes to only" in render_card(verdict, CONTEXT)


def shown(renderable: RenderableType) -> str:
    target = StringIO()
    Console(file=target, width=100).print(renderable)
    return target.getvalue()


def test_a_plan_is_written_in_units() -> None:
    text = shown(plan_table({"calibration_seconds": 90.4, "peak_bytes": 3 * 2**30, "disk": {"gptq_bytes": 2**20}}))
    assert [line.split() for line in text.splitlines() if line.strip()][2:] == [
        ["calibration", "90", "s"],
        ["peak", "3.00", "GiB"],
        ["disk", "gptq", "1.0", "MiB"],
    ]


def test_an_inspection_lists_experts_and_outcome() -> None:
    found = {
        "folder": "mixture",
        "certificates": {
            "rtn": {"method": "rtn", "scheme": "w4a16", "bits_per_weight": 4.25, "substituted_share": 0.5},
            "theirs": {},
        },
        "bytes": {"folder": 4096, "shared": 1024, "experts": {"rtn": 2048, "theirs": 512}},
        "verdict": {"recipe": "0" * 16, "protocols": {"whole": {"sentence": "The mixture does not win here."}}},
        "verified": True,
    }
    text = shown(inspection_table(found))
    for wanted in ("4.250", "50.0 %", "2.0 KiB", "theirs", "does not win here", "digest"):
        assert wanted in text
