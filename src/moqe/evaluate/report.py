"""The report: one HTML page with everything in it, readable with no network, by light or dark, wide or narrow."""

from __future__ import annotations

from pathlib import Path

from markupsafe import Markup

from moqe.evaluate.context import ReportContext
from moqe.evaluate.metrics import METRICS
from moqe.evaluate.plots import curve_plot, difference_plot, share_plot
from moqe.evaluate.templates import environment
from moqe.evaluate.verdict import Verdict
from moqe.store import write_text


def render_report(verdict: Verdict, context: ReportContext) -> str:
    """The report as HTML. Names and texts are escaped; only the plots are inserted as they are."""
    metric = METRICS[verdict.metric]
    plots = {
        name: {
            "difference": Markup(difference_plot(found)),
            "share": Markup(share_plot(found)),
            "curve": Markup(curve_plot(found, found.curve, metric.label) if found.curve else ""),
        }
        for name, found in verdict.protocols.items()
    }
    template = environment(html=True).get_template("report.html.jinja")
    return template.render(verdict=verdict, context=context, metric=metric, plots=plots)


def write_report(path: Path, verdict: Verdict, context: ReportContext) -> None:
    """Write the report. Equal inputs give equal bytes."""
    write_text(path, render_report(verdict, context))
