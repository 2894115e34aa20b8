"""The card: the mixture's README.md, which says what it is, what it was measured to be worth, and how it was made."""

from __future__ import annotations

from pathlib import Path

from moqe.evaluate.context import ReportContext
from moqe.evaluate.metrics import METRICS
from moqe.evaluate.templates import environment
from moqe.evaluate.verdict import Verdict
from moqe.store import write_text


def render_card(verdict: Verdict, context: ReportContext) -> str:
    """The card as Markdown, with the front matter that model hubs read."""
    metric = METRICS[verdict.metric]
    template = environment(metric, html=False).get_template("card.md.jinja")
    return template.render(verdict=verdict, context=context, metric=metric)


def write_card(path: Path, verdict: Verdict, context: ReportContext) -> None:
    """Write the card. Equal inputs give equal bytes."""
    write_text(path, render_card(verdict, context))
