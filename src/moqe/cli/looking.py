"""Verbs that look: `inspect`, `bench`, `doctor`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from moqe.cli.app import Dir, Json, app
from moqe.cli.terminal import Bars, emit, say


@app.command()
def inspect(
    folder: Dir,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read shared files and experts, and compare digests.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show what a mixture is made of: recipe, experts, certificates, bytes, verdict."""
    from moqe.evaluate.terminal import inspection_table
    from moqe.mixture import inspect as look

    found = look(folder, verify=verify, progress=Bars())
    if as_json:
        emit(found)
    else:
        Console().print(inspection_table(found))


@app.command()
def bench(
    folder: Dir,
    runtime: Annotated[
        str | None,
        typer.Option(
            help="packed, packed-float32, packed-compiled, llama.cpp or onnx; by default what suits each expert."
        ),
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=2, help="Tokens of a prompt.")] = 256,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens of an answer.")] = 64,
    requests: Annotated[int, typer.Option(min=1, help="Measured answers of each.")] = 20,
    threads: Annotated[int | None, typer.Option(min=1, help="Of one answer; by default torch's number.")] = None,
    memory: Annotated[bool, typer.Option(help="Start a process for each to see what stays in memory.")] = True,
    as_json: Json = False,
) -> None:
    """Measure latency, tokens per second and memory of every expert, the router and the mixture."""
    from moqe.speed import bench as measure
    from moqe.speed.page import bench_renderable

    found = measure(
        folder,
        runtime=runtime,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        requests=requests,
        threads=threads,
        memory=memory,
        progress=Bars(),
    )
    if as_json:
        emit(found)
    else:
        Console().print(bench_renderable(found))


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what this machine offers: versions, threads, instruction sets, devices, optional packages."""
    from moqe.doctor import doctor as examine

    report = examine()
    if as_json:
        emit(report)
        return
    for section, entries in report.items():
        say(f"[bold]{escape(section)}[/bold]")
        for name, value in entries.items():
            say(f"  {escape(name):24} {escape(str(value))}")
