"""Advice as a table for the terminal, and as files: advice.json and a plot."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from moqe.advice.advice import Advice, Range, Row
from moqe.evaluate import format as write
from moqe.store import atomic, write_json

JSON, PLOT = "advice.json", "advice.png"


def write_advice(folder: Path, advice: Advice) -> None:
    """Write advice.json and advice.png, over those of an earlier advice."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / JSON, asdict(advice))
    with atomic(folder / PLOT) as partial:
        write_plot(partial, advice)


def advice_renderable(advice: Advice) -> RenderableType:
    """The tables of single models and of mixtures, what they rest on, and the sentence."""
    return Group(
        _single_table(advice),
        _mixture_table(advice),
        Text(_notes(advice)),
        Text(advice.sentence, style="bold green" if advice.pays_by_bandwidth else "bold"),
    )


def _table(title: str) -> Table:
    return Table(
        title=Text(title, style="bold"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )


def _single_table(advice: Advice) -> Table:
    table = _table("One model, nats per token")
    for title in (
        "bits",
        "bits per\nweight",
        "method",
        "loss",
        "gap to\nthe base",
        "95 %\ninterval",
        "divergence",
        "steps",
    ):
        table.add_column(title, justify="left" if title == "method" else "right", no_wrap=True)
    for width in advice.widths:
        table.add_row(
            str(width.bits),
            write.number(width.bits_per_weight, 2),
            width.method,
            write.number(width.loss),
            write.number(width.gap.value),
            _bounds(width.gap),
            write.number(width.divergence),
            str(width.steps),
        )
    table.add_row("base", "", "", write.number(advice.base_loss), "", "", "", "")
    return table


def _mixture_table(advice: Advice) -> Table:
    table = _table("Specialists that share codes: predicted gain over one expert, nats per token")
    titles = (
        "bits",
        "experts",
        "memory",
        "gain",
        "from to",
        "by label",
        "same\nstorage",
        "same\nbytes read",
        "measured\nin loss",
    )
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    for row in advice.rows:
        table.add_row(*_cells(row), end_section=_last_of_width(row, advice))
    return table


def _cells(row: Row) -> list[str]:
    return [
        str(row.bits),
        str(row.experts),
        f"{row.memory_ratio:.2f}",
        write.signed(row.gain.value),
        _bounds(row.gain),
        write.signed(row.label_gain.value),
        write.signed(row.storage_gain.value),
        write.signed(row.bandwidth_gain),
        write.signed(row.loss_gain.value),
    ]


def _last_of_width(row: Row, advice: Advice) -> bool:
    return row is [other for other in advice.rows if other.bits == row.bits][-1]


def _bounds(found: Range) -> str:
    return f"[{write.signed(found.low)}, {write.signed(found.high)}]"


def _notes(advice: Advice) -> str:
    """What the numbers rest on, in sentences."""
    sampled = advice.sampled
    kind = "clusters" if sampled.clusters else "domains"
    notes = [
        f"Judged on {sampled.windows['judging']} windows of {sampled.window} tokens from {sampled.judging_documents} "
        f"documents; {len(sampled.labels)} {kind}; a linear router on the first {sampled.router_tokens} tokens names "
        f"{write.percent(sampled.router_accuracy)} of them correctly.",
        f"Specialists see their own windows {advice.own_weight:g} times as often.",
        f"Experts follow base and text, the text with a weight of {advice.text_weight:g}; gains are of loss, "
        "adaptation to the texts included. Same storage: one model of more bits, interpolated between untrained codes."
        if advice.text_weight
        else "Gains are of divergence from the base. Same storage: one model of more bits, interpolated.",
    ]
    if any("steps" in row.extrapolated for row in advice.rows):
        notes.append(
            f"Gains are extrapolated from {advice.own_steps} to {advice.full_own_steps} steps of a specialist's own, "
            f"up to {advice.growth:.2f}-fold with every doubling."
        )
    beyond = sorted({row.experts for row in advice.rows if "experts" in row.extrapolated})
    if beyond:
        notes.append(f"Gains of {', '.join(map(str, beyond))} experts are extrapolated from fewer.")
    if advice.cut:
        notes.append(f"For want of time: {'; '.join(advice.cut)}.")
    steps = ", ".join(f"{name} {value:.0f} s" for name, value in advice.seconds.items())
    return " ".join([*notes, f"Times: {steps}."])


def write_plot(path: Path, advice: Advice) -> None:
    """Draw predicted gains with their bounds against bits, beside what one model of as many bytes gains; PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.add_subplot()
    bits = sorted({row.bits for row in advice.rows})
    sizes = sorted({row.experts for row in advice.rows})
    for index, count in enumerate(sizes):
        rows = [row for row in advice.rows if row.experts == count]
        shift = 0.6 * ((index + 0.5) / len(sizes) - 0.5)
        places = [bits.index(row.bits) + shift for row in rows]
        gains = [row.gain for row in rows]
        errors = [[gain.value - gain.low for gain in gains], [gain.high - gain.value for gain in gains]]
        colour = f"C{index}"
        axes.errorbar(
            places,
            [gain.value for gain in gains],
            yerr=errors,
            fmt="o",
            color=colour,
            capsize=3,
            label=f"{count} experts",
        )
        axes.plot(
            places, [row.storage_gain.value for row in rows], "_", color=colour, markersize=14, markeredgewidth=2.5
        )
    axes.plot([], [], "_", color="0.3", markersize=14, markeredgewidth=2.5, label="one model of the same storage")
    axes.axhline(0, color="0.3", linewidth=1, label="one model of the same bytes read per token")
    axes.set_xticks(range(len(bits)), [f"{one} bits" for one in bits])
    axes.set_ylabel("predicted gain, nats per token")
    axes.set_yscale("symlog", linthresh=_linear_below(advice))
    axes.margins(y=0.1)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    FigureCanvasAgg(figure).print_png(path, metadata={"Software": None})


def _linear_below(advice: Advice) -> float:
    """Where the scale turns from linear to logarithmic: gains of 2 and of 8 bits lie decades apart."""
    sizes = sorted(abs(row.gain.value) for row in advice.rows if row.gain.value)
    return max(1e-4, sizes[len(sizes) // 2] / 2) if sizes else 1e-3
