"""The application that verbs are added to, and what several of them take."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core
from rich.console import Console
from rich.logging import RichHandler

from moqe.cli.terminal import say
from moqe.version import __version__

VERBS = (
    "quickstart", "build", "evaluate", "route", "generate", "classify", "inspect", "export", "bench", "advise", "doctor"
)  # fmt: skip


class _Verbs(typer.core.TyperGroup):
    """Lists verbs in the order in which somebody needs them."""

    def list_commands(self, ctx: Any) -> list[str]:
        """The names of all verbs."""
        return sorted(self.commands, key=VERBS.index)


app = typer.Typer(
    name="moqe",
    cls=_Verbs,
    help="Mixture of Quantization Experts: several quantized variants of one model, and a router that picks per input.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1, ...")]
Dir = Annotated[Path, typer.Argument(help="The mixture's folder.", metavar="DIR")]
Text = Annotated[str, typer.Argument(help="The text; `-` reads standard input.")]
Pin = Annotated[str | None, typer.Option("--expert", help="Use this expert instead of the router's choice.")]


@app.callback(invoke_without_command=True)
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say more on standard error.")] = False,
) -> None:
    if version:
        say(f"moqe {__version__}")
        raise typer.Exit
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING,
        format="%(message)s",
        handlers=[RichHandler(console=Console(stderr=True), show_path=False, show_time=False)],
    )
