"""`advise`, which predicts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core
from rich.console import Console
from rich.markup import escape

from moqe.cli.app import Device, Json, app
from moqe.cli.terminal import Bars, emit, say


class _Lists(typer.core.TyperCommand):
    """A command whose list options take all values up to the next option: `--bits 2 3 4`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Repeat the option before every further value."""
        lists = {name for option in self.params if option.multiple for name in option.opts}
        current, spread = "", []
        for number, word in enumerate(args):
            if word.startswith("--"):
                current = word if word in lists else ""
            elif current and args[number - 1] != current:
                spread.append(current)
            spread.append(word)
        return super().parse_args(ctx, spread)


@app.command(cls=_Lists)
def advise(
    base: Annotated[str, typer.Argument(help="The full-precision model, as in a recipe.", metavar="BASE")],
    data: Annotated[list[str], typer.Option(help="Texts: paths, hub ids, bundled names; `path=domain` labels one.")],
    bits: Annotated[list[int], typer.Option(help="Widths of the codes.")] = [2, 3, 4, 8],  # noqa: B006
    experts: Annotated[list[int], typer.Option(help="Sizes of mixtures, the generalist counted.")] = [2, 4, 6],  # noqa: B006
    minutes: Annotated[float, typer.Option(help="How long it may take.")] = 10.0,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="A folder for advice.json and advice.png.")] = None,
    window: Annotated[int, typer.Option(help="Tokens of a sample.")] = 256,
    steps: Annotated[int | None, typer.Option(help="Steps of distillation, instead of as many as fit.")] = None,
    text_weight: Annotated[float, typer.Option(help="Share of the text in what experts follow, as in a recipe.")] = 0.0,
    own_weight: Annotated[
        float, typer.Option(help="How much oftener a specialist sees its own text, as in a recipe.")
    ] = 8.0,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Predict in minutes, from a sample, whether a mixture of specialists is worth building."""
    from moqe.advice import advise as ask
    from moqe.advice.page import advice_renderable

    advice = ask(
        base,
        data,
        bits=bits,
        experts=experts,
        minutes=minutes,
        out=out,
        window=window,
        steps=steps,
        text_weight=text_weight,
        own_weight=own_weight,
        seed=seed,
        device=device,
        progress=Bars(),
    )
    if as_json:
        emit(advice)
        return
    Console().print(advice_renderable(advice))
    if out is not None:
        say(f"Plot: {escape(str(out / 'advice.png'))}")
