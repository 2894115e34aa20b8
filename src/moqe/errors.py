"""Every error that MoQE raises on purpose.

    MoqeError
    |-- RecipeError            the recipe is malformed, names something unknown, or asks for the impossible
    |   `-- RecipeChanged      a folder holds work made from another recipe
    |-- DataError              a data source is missing, empty, too short, or its documents overlap between splits
    |-- ModelError             the base model cannot be loaded, is already quantized, or has an unknown structure
    |-- CheckpointError        an expert's files are missing, truncated, corrupt, or belong to another tokenizer
    |-- UnsupportedLayer       a method cannot do a layer, and the recipe does not allow a substitution
    |-- NumericalError         non-finite weights, activations, statistics or losses
    |-- ProtocolError          losses measured by different rules or runtimes were about to be mixed
    |-- RemoteError            a server that runs an expert is not reachable, refuses, or lacks what is asked of it
    |-- FolderBusy             the folder cannot be had: another process builds in it, or it is no folder
    |-- DiskFull               not enough room for what is about to be written
    `-- MissingExtra           an optional dependency is absent; the message holds the install line

A message says what happened, where, and what to change. The command line prints it without a traceback and exits
with 2.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MoqeError(Exception):
    """Base class of every error MoQE raises on purpose."""


class RecipeError(MoqeError):
    """The recipe is malformed, names something unknown, or asks for a combination that does not exist."""


class RecipeChanged(RecipeError):
    """A folder holds work made from another recipe."""


class DataError(MoqeError):
    """A data source is missing, empty, too short, or its documents overlap between splits."""


class ModelError(MoqeError):
    """The base model cannot be loaded, is already quantized, or has a structure MoQE cannot walk."""


class CheckpointError(MoqeError):
    """An expert's files are missing, truncated, corrupt, or belong to another tokenizer."""


class UnsupportedLayer(MoqeError):
    """A method cannot do a layer, and the recipe does not allow a substitution."""


class NumericalError(MoqeError):
    """Non-finite weights, activations, statistics or losses."""


class ProtocolError(MoqeError):
    """Losses measured by different rules or runtimes were about to be mixed."""


class RemoteError(MoqeError):
    """A server that runs an expert is not reachable, refuses, or lacks what is asked of it; the message has its URL."""


class FolderBusy(MoqeError):
    """The folder cannot be had: another process builds in it, or it is no folder."""


class DiskFull(MoqeError):
    """Not enough room for what is about to be written."""


class MissingExtra(MoqeError):
    """An optional dependency is absent; the message holds the install line."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs {package}, which is not installed: in MoQE's folder, pip install '.[{extra}]'"
        )


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A sentence fragment that helps with a misspelt name: the closest known name, else all of them."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}"
