"""The report's plots, as SVG to be set into a page.

matplotlib draws them in placeholder colours, which become CSS variables, so that one drawing serves light and dark
pages; text stays text and takes the page's font. No dates, ids or random names: equal verdicts give equal bytes.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from html import escape
from typing import Any

from moqe.evaluate import format as write
from moqe.evaluate.context import MemoryPoint
from moqe.evaluate.metrics import Metric
from moqe.evaluate.telling import telling
from moqe.evaluate.verdict import Curve, ProtocolVerdict

SERIES = 8  # colours that the page defines; experts beyond repeat them, and the table beside says which is which
INK, MUTED, GRID, ACCENT, SURFACE = "#00000a", "#00000b", "#00000c", "#00000d", "#00000e"
VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid", ACCENT: "accent", SURFACE: "surface"} | {
    f"#0000{index:02d}": f"series-{index}" for index in range(1, SERIES + 1)
}
WIDTH = 5.2  # inches; 72 px each, so that 11 px text stays legible on a phone
STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 11,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.unicode_minus": True,
}


def difference_plot(found: ProtocolVerdict, metric: Metric) -> str:
    """Differences to the best single expert with their intervals, one row each, as the metric writes them; SVG.

    The base model is left out, because its distance would squeeze the rest; a row beyond the scale gets an arrow.
    """
    rows = [line for line in found.lines if line.difference is not None and line.kind != "base"][::-1]
    if not rows:
        return ""
    reach = [
        max(abs(bound) for bound in (d.value, d.low, d.high) if bound is not None)
        for d in (line.difference for line in rows if line.difference is not None)
    ]
    decisive = max([extent for extent, line in zip(reach, rows, strict=True) if line.kind == "mixture"], default=0.0)
    limit = 1.15 * max(min(max(reach), 4 * sorted(reach)[len(reach) // 2]), decisive, 1e-6)
    what = "Loss differences" if metric.lower_is_better else "Differences in accuracy"
    with _figure(0.9 + 0.27 * len(rows), left=0.30, right=0.86) as (figure, axes):
        for y, line in enumerate(rows):
            d = line.difference
            assert d is not None
            colour = ACCENT if line.kind == "mixture" else (MUTED if line.kind in ("no skill", "bound") else INK)
            inside = abs(d.value) <= limit
            if inside and d.low is not None and d.high is not None:
                axes.plot(
                    [metric.scale * d.low, metric.scale * d.high],
                    [y, y],
                    color=colour,
                    linewidth=2,
                    solid_capstyle="round",
                )
            position = d.value if inside else limit * 0.98 * (1 if d.value > 0 else -1)
            marker = "o" if inside else (">" if d.value > 0 else "<")
            axes.plot(
                [metric.scale * position], [y], marker, color=colour, markersize=7 if line.kind == "mixture" else 5.5
            )
            written = write.metric_difference(d.value, metric)
            axes.text(1.02, y, written, transform=axes.get_yaxis_transform(), va="center", color=colour)
        axes.axvline(0, color=MUTED, linewidth=1)
        axes.set_xlim(-metric.scale * limit, metric.scale * limit)
        axes.set_ylim(-0.7, len(rows) - 0.3)
        axes.set_yticks(range(len(rows)), [_short(line.name) for line in rows])
        axes.locator_params(axis="x", nbins=4)
        axes.set_xlabel(f"difference to {_short(found.best_single)}; the line is zero")
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
        return _svg(figure, f"difference-{found.protocol}", f"{what} to the best single expert with intervals")


def share_plot(found: ProtocolVerdict, metric: Metric) -> str:
    """Where the mixture sends the samples of each domain, or of the most telling classes: stacked bars; SVG.

    A bar is longer than 100 % where two experts answer together.
    """
    shown = telling(found.domains, metric)
    rows = [("all", found.mixture.share), *((row.domain, row.share) for row in shown[::-1])]
    longest = max(1.0, *(sum(share.values()) for _, share in rows))
    names = list(found.experts)
    legend_lines = (len(names) + 2) // 3
    with _figure(0.5 + 0.34 * len(rows) + 0.24 * legend_lines, left=0.30, right=0.93) as (figure, axes):
        for y, (_, share) in enumerate(rows):
            start = 0.0
            for index, name in enumerate(names):
                axes.barh(
                    y, share[name], 0.62, left=start, color=_series(index), edgecolor=SURFACE, linewidth=1.5,
                    label=_short(name) if y == 0 else None,
                )  # fmt: skip
                start += share[name]
        axes.set_yticks(range(len(rows)), [_short(label) for label, _ in rows])
        axes.set_xlim(0, longest if longest > 1.0001 else 1)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100 %"])
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
        figure.legend(
            loc="upper left", bbox_to_anchor=(0.0, 1.0), ncols=3, frameon=False, handlelength=0.9, labelcolor=INK
        )
        height = figure.get_figheight()
        figure.subplots_adjust(top=1 - (0.1 + 0.24 * legend_lines) / height, bottom=0.3 / height)
        return _svg(figure, f"share-{found.protocol}", f"Share of samples that each expert gets, by {metric.group}")


def curve_plot(found: ProtocolVerdict, curve: Curve, metric: Metric) -> str:
    """Mean value when a growing share of samples leaves the best single expert; SVG."""
    what = "Mean loss" if metric.lower_is_better else "Accuracy"
    with _figure(3.2, left=0.17, right=0.97) as (figure, axes):
        share = [100 * value for value in curve.share]
        predicted, random, oracle = (
            [metric.scale * value for value in values] for values in (curve.predicted, curve.random, curve.oracle)
        )
        axes.plot(share, random, color=MUTED, linewidth=1.5, linestyle=(0, (4, 3)), label="random order")
        axes.plot(share, oracle, color=MUTED, linewidth=1.5, label="oracle")
        axes.plot(share, predicted, color=ACCENT, linewidth=2.2, label="router's order")
        axes.axhline(predicted[0], color=GRID, linewidth=1, zorder=0)
        axes.plot(
            [100 * curve.deployed_share], [metric.scale * curve.deployed_value], "o", color=ACCENT, markersize=9,
            markeredgecolor=SURFACE, markeredgewidth=2, label="deployed", zorder=5,
        )  # fmt: skip
        axes.set_xlabel(f"% of samples moved away from {_short(found.best_single)}")
        axes.set_ylabel(metric.label)
        axes.ticklabel_format(axis="y", useOffset=False)
        axes.locator_params(axis="y", nbins=5)
        axes.tick_params(axis="y", colors=MUTED)
        figure.legend(
            loc="upper left",
            bbox_to_anchor=(0.0, 1.0),
            ncols=2,
            frameon=False,
            handlelength=1.6,
            labelcolor=INK,
            columnspacing=1.2,
        )
        figure.subplots_adjust(top=0.82)
        return _svg(figure, f"curve-{found.protocol}", f"{what} against the share of samples routed away")


def memory_plot(points: Sequence[MemoryPoint]) -> str:
    """What growing memory buys: the divergence that was trained against bytes in those of one expert; SVG."""
    with _figure(2.8, left=0.19, right=0.97) as (figure, axes):
        memory, divergence = ([getattr(point, name) for point in points] for name in ("memory", "divergence"))
        axes.plot(memory, divergence, "o-", color=ACCENT, linewidth=2.2, markersize=6)
        axes.set_xlabel("memory, in bytes of one expert")
        axes.set_ylabel("divergence, nats")
        axes.ticklabel_format(axis="both", useOffset=False)
        axes.locator_params(axis="both", nbins=5)
        axes.tick_params(axis="y", colors=MUTED)
        return _svg(figure, "memory", "Divergence against the memory of the mixture")


def _series(index: int) -> str:
    return f"#0000{index % SERIES + 1:02d}"


def _short(name: str, limit: int = 20) -> str:
    return name if len(name) <= limit else name[: limit - 1] + "\N{HORIZONTAL ELLIPSIS}"


@contextmanager
def _figure(height: float, *, left: float, right: float) -> Iterator[tuple[Any, Any]]:
    """A figure of the page's width and its one axes, drawn under STYLE. `left` and `right` are shares of the width."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height))
        figure.patch.set_alpha(0)
        axes = figure.add_subplot()
        axes.patch.set_alpha(0)
        figure.subplots_adjust(left=left, right=right, top=0.98, bottom=0.55 / height)
        yield figure, axes


def _svg(figure: Any, salt: str, title: str) -> str:
    """The figure as an SVG element for a page: CSS colours, the page's font, a title, nothing that varies."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    target = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": salt}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # the browser's font draws the text
        FigureCanvasSVG(figure).print_svg(target, metadata={"Date": None, "Creator": None})
    content = target.getvalue()
    content = content[content.index("<svg") :].rstrip()
    content = re.sub(r"<!--.*?-->\s*", "", content, flags=re.DOTALL)
    content = re.sub(r"<metadata>.*?</metadata>\s*", "", content, flags=re.DOTALL)
    content = re.sub(r'<g id="[^"]*"', "<g", content)  # the same ids in every figure, and nothing refers to them
    content = re.sub(r" font-family: [^;\"]*;", "", content)
    content = re.sub(
        r"<defs>\s*<style.*?</defs>\s*", "", content, count=1, flags=re.DOTALL
    )  # would style the whole page
    for colour, name in VARIABLES.items():
        content = content.replace(colour, f"var(--{name})")
    head, rest = content.split(">", 1)
    head = re.sub(r' (width|height|version)="[^"]*"', "", head)
    return f'{head} role="img" aria-label="{escape(title)}"><title>{escape(title)}</title>{rest}'
