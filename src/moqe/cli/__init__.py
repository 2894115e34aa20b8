"""The command line. Every verb is a public function of the package; `--json` prints what the function returned.

Mistakes that a user can mend end with one line on standard error and exit code 2; Ctrl-C leaves a folder that the same
command continues, and exits with 130.
"""

from __future__ import annotations

import sys

import typer
from rich.console import Console
from rich.markup import escape

from moqe.cli import advising, asking, looking, making  # each adds its verbs
from moqe.cli.app import app
from moqe.cli.terminal import Bars
from moqe.errors import MoqeError

__all__ = ["Bars", "advising", "app", "asking", "looking", "main", "making"]


def main() -> None:
    """Entry point: run the command line, turn errors into one line and exit code 2."""
    try:
        app(standalone_mode=False)
    except MoqeError as error:
        Console(stderr=True).print(f"[red]error:[/red] {escape(' '.join(str(error).split()))}", soft_wrap=True)
        sys.exit(2)
    except typer.Exit as leave:
        sys.exit(leave.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        Console(stderr=True).print("interrupted: the same command continues where it stopped", soft_wrap=True)
        sys.exit(130)
    except Exception as error:
        # A wrong use of the command line. Typer has a copy of click of its own, so the class cannot be named.
        show = getattr(error, "show", None)
        if show is None or not hasattr(error, "format_message"):
            raise
        show()
        sys.exit(2)
