"""What the command line writes: bars with time left, JSON, lines."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from moqe.progress import Advance


class Bars:
    """Progress bars with time left, on standard error; silent when that is not a terminal."""

    def __init__(self) -> None:
        from huggingface_hub.utils.tqdm import enable_progress_bars
        from transformers.utils.logging import disable_progress_bar

        self.console = Console(stderr=True)
        disable_progress_bar()  # its bars would run through ours
        if self.console.is_terminal:
            enable_progress_bars()  # of downloads, which come before any bar of ours

    @contextmanager
    def track(self, what: str, total: int) -> Iterator[Advance]:
        """Show one bar for `total` steps of `what`."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        if not self.console.is_terminal:
            logging.getLogger("moqe").info("%s (%d steps)", what, total)
        with Progress(*columns, console=self.console, disable=not self.console.is_terminal, transient=True) as bars:
            task = bars.add_task(escape(what), total=total)
            yield lambda steps: bars.advance(task, steps)


def emit(value: Any) -> None:
    """Print a result as JSON."""
    content = asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
    sys.stdout.write(json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n")


def read(text: str) -> str:
    """A text that was given, or standard input for `-`."""
    return sys.stdin.read() if text == "-" else text


def say(message: str = "") -> None:
    """Print a line, with rich's markup, on standard output."""
    Console().print(message, soft_wrap=True)
