"""The tasks a recipe can name. A task is one file and one line here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from moqe.recipe import Recipe
from moqe.tasks.language import LanguageTask
from moqe.tasks.task import ExpertFacts, Samples, Task

TASKS: dict[str, Callable[[Recipe, Path, str], Task]] = {
    "language": LanguageTask,
}

__all__ = ["TASKS", "ExpertFacts", "LanguageTask", "Samples", "Task"]
