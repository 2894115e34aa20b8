"""The report: one HTML page with everything in it, readable with no network, by light or dark, wide or narrow."""

from __future__ import annotations

import base64
from pathlib import Path

from markupsafe import Markup

from moqe.evaluate.context import ReportContext
from moqe.evaluate.metrics import METRICS
from moqe.evaluate.plots import curve_plot, difference_plot, memory_plot, share_plot
from moqe.evaluate.templates import environment
from moqe.evaluate.verdict import Verdict
from moqe.store import write_text


def render_report(verdict: Verdict, context: ReportContext) -> str:
    """The report as HTML. Names and texts are escaped; only the plots are inserted as they are."""
    metric = METRICS[verdict.metric]
    plots = {
        name: {
            "difference": Markup(difference_plot(found, metric)),
            "share": Markup(share_plot(found, metric)),
            "curve": Markup(curve_plot(found, found.curve, metric) if found.curve else ""),
        }
        for name, found in verdict.protocols.items()
    }
    memory = Markup(memory_plot(context.memory) if context.memory else "")
    pictures = [_address(image.png) for image in context.contact.images] if context.contact else []
    template = environment(metric, html=True).get_template("report.html.jinja")
    return template.render(
        verdict=verdict, context=context, metric=metric, plots=plots, memory=memory, pictures=pictures
    )


def write_report(path: Path, verdict: Verdict, context: ReportContext) -> None:
    """Write the report. Equal inputs give equal bytes."""
    write_text(path, render_report(verdict, context))


def _address(png: bytes) -> str:
    """A picture as an address that holds the picture."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")
