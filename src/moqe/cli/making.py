"""Verbs that make something: `quickstart`, `build`, `evaluate`, `export`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from moqe.cli.app import Device, Dir, Json, app
from moqe.cli.terminal import Bars, emit, say

if TYPE_CHECKING:
    from moqe.build import BuildResult


@app.command()
def quickstart(
    folder: Annotated[Path, typer.Argument(help="Where to put the mixture.", metavar="DIR")] = Path("moqe-quickstart"),
    task: Annotated[str, typer.Option(help="What the bundled model does: language or image-classification.")] = (
        "language"
    ),
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Build and judge a mixture of a bundled model: a few minutes, no network."""
    from moqe.verbs import quickstart as make

    _show_build(make(folder, task=task, device=device, progress=Bars()), as_json)


@app.command()
def build(
    recipe: Annotated[Path, typer.Argument(help="A recipe (YAML).", metavar="RECIPE")],
    folder: Annotated[
        Path | None, typer.Option("--out", "-o", help="The mixture's folder; by default the recipe's name.")
    ] = None,
    device: Device = "cpu",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print predicted time, RAM and disk; make nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Make experts, loss table, router and verdict from a recipe. The same command resumes an interrupted build."""
    from moqe.recipe import load_recipe

    parsed, target = load_recipe(recipe), folder or Path(recipe.stem)
    if dry_run:
        from moqe.build import plan
        from moqe.evaluate.terminal import plan_table

        prediction = plan(parsed, device, Bars()).summary()
        if as_json:
            emit(prediction)
        else:
            Console().print(plan_table(prediction))
        return
    from moqe.build import build as make

    _show_build(make(parsed, target, device=device, progress=Bars()), as_json)


def _show_build(result: BuildResult, as_json: bool) -> None:
    from moqe.evaluate.terminal import verdict_renderable

    if as_json:
        emit(result.summary())
        return
    Console().print(verdict_renderable(result.verdict))
    say(f"[dim]{escape(result.sentence())}[/dim]")
    say(f"Report: {escape(str(result.folder / 'report.html'))}")


@app.command()
def evaluate(
    folder: Dir,
    runtime: Annotated[
        str | None, typer.Option(help="Also compare this runtime with the reference, for the report.")
    ] = None,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Judge a mixture again: score what is missing from the loss table, then write verdict, report and card."""
    from moqe.build import evaluate as judge
    from moqe.evaluate.terminal import verdict_renderable

    verdict = judge(folder, runtime=runtime, device=device, progress=Bars())
    if as_json:
        emit(verdict)
    else:
        Console().print(verdict_renderable(verdict))


@app.command()
def export(
    folder: Dir,
    to: Annotated[str, typer.Option(help="gguf, compressed-tensors, or onnx for images.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="A new folder; by default the mixture's name and the format.")
    ] = None,
    experts: Annotated[list[str], typer.Option("--expert", help="Only this one; may be given several times.")] = [],  # noqa: B006
    rounding: Annotated[
        bool, typer.Option("--rounding", help="Let GGUF round scales where that makes a file possible or smaller.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write experts as plain files for llama.cpp, Ollama, LM Studio, transformers, vLLM or ONNX Runtime."""
    from moqe.export import export as write

    done = write(folder, to, out, experts=experts, rounding=rounding, progress=Bars())
    if as_json:
        emit(done)
        return
    for name, entry in done.experts.items():
        largest = max((found["largest_error"] for found in entry.get("rounded", {}).values()), default=0.0)
        note = (
            f"  [yellow]scales rounded, largest error {largest:.1e} of the largest weight[/yellow]" if largest else ""
        )
        say(f"  {escape(name):24} {escape(str(done.folder / (entry.get('file') or entry['folder'])))}{note}")
