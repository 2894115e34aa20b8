"""The tasks a recipe can name. A task is one file and one line here."""

from __future__ import annotations

from moqe.tasks.images import ImageTask
from moqe.tasks.language import LanguageTask
from moqe.tasks.task import ExpertFacts, Samples, Task

TASKS: dict[str, type[Task]] = {
    "language": LanguageTask,
    "image-classification": ImageTask,
}

__all__ = ["TASKS", "ExpertFacts", "ImageTask", "LanguageTask", "Samples", "Task"]
