"""Verbs that ask a mixture: `route`, `generate`, `classify`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from moqe.cli.app import Device, Dir, Json, Pin, Text, app
from moqe.cli.terminal import Bars, emit, read, say


@app.command()
def route(
    folder: Dir,
    sample: Annotated[str, typer.Argument(help="The text, `-` for standard input; or an image's path.")],
    protocol: Annotated[
        str | None, typer.Option(help="What the router may see, if not what it was deployed for.")
    ] = None,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Say which expert the router sends an input to, and what it predicts for each."""
    from moqe.verbs import route as ask

    decision = ask(folder, read(sample), protocol=protocol, device=device, progress=Bars())
    if as_json:
        emit(decision)
        return
    say(f"[bold]{escape(decision.expert)}[/bold]  {escape(decision.reason)}")
    for name, cost in sorted(decision.costs.items(), key=lambda item: item[1]):
        say(f"  {escape(name):24} {cost:+.4f} {decision.unit}")


@app.command()
def generate(
    folder: Dir,
    text: Text,
    expert: Pin = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the most probable token.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    runtime: Annotated[
        str | None, typer.Option(help="What runs the expert, such as packed; by default the reference.")
    ] = None,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Continue a text with the expert that the router chooses."""
    from moqe.verbs import generate as ask

    answer = ask(
        folder,
        read(text),
        expert=expert,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        runtime=runtime,
        device=device,
        progress=Bars(),
    )
    if as_json:
        emit(answer)
        return
    sys.stdout.write(answer.text + "\n")
    Console(stderr=True).print(f"[dim]expert: {escape(answer.expert)} ({escape(answer.reason)})[/dim]")


@app.command()
def classify(
    folder: Dir,
    image: Annotated[Path, typer.Argument(help="An image file.", metavar="IMAGE")],
    expert: Pin = None,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Name what an image shows, with the expert that the router chooses."""
    from moqe.verbs import classify as ask

    answer = ask(folder, image, expert=expert, device=device, progress=Bars())
    if as_json:
        emit(answer)
        return
    for label, probability in answer.top.items():
        say(f"{escape(label):24} {probability:.4f}")
    asked = escape(answer.expert) + (f", then {escape(answer.second)}" if answer.second else "")
    Console(stderr=True).print(f"[dim]expert: {asked} ({escape(answer.reason)})[/dim]")
