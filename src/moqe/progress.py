"""Progress of long work: the library says what it does, the caller decides how to show it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

Advance = Callable[[int], None]


class Progress(Protocol):
    """Shows how far a piece of work is."""

    def track(self, what: str, total: int) -> AbstractContextManager[Advance]:
        """Announce `total` steps of `what`; the context yields a function that says how many more are done."""


def ignore(steps: int) -> None:
    """An `Advance` that shows nothing."""


class Silent:
    """Shows nothing."""

    @contextmanager
    def track(self, what: str, total: int) -> Iterator[Advance]:
        """Ignore everything."""
        yield ignore
