"""Data sets of the hugging face hub, through the extra `hub`."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from moqe.errors import DataError, MissingExtra
from moqe.recipe import Source


@contextmanager
def hub_rows(path: str, source: Source) -> Iterator[tuple[Any, Any]]:
    """The library `datasets` and the rows of a data set, streamed. path: its id, or a folder that holds one.

    What goes wrong in the block is told as DataError. Raises MissingExtra without the library, DataError when the data
    set cannot be had.
    """
    try:
        datasets: Any = importlib.import_module("datasets")
    except ModuleNotFoundError:
        raise MissingExtra("datasets", "hub", f"{path!r} is not on this disk, and reading it from the hub") from None
    try:
        yield (
            datasets,
            datasets.load_dataset(path, source.subset or None, split=source.split, streaming=True),
        )
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"the data set {path!r} cannot be loaded: {' '.join(str(error).split())}") from error
