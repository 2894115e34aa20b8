"""Predictions: what every expert believes about every sample of known class, as log-probabilities.

They are kept where samples have one true class, because what several experts answer together cannot be told from their
losses. On disk one parquet file in long form, half precision: an error of at most 0.05 % of a log-probability.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from moqe.errors import CheckpointError, NumericalError, ProtocolError, did_you_mean
from moqe.evaluate.parquet import read_rows

BASE = "base"
PREDICTION_SCHEMA = pa.schema(
    [
        pa.field("split", pa.string(), nullable=False),
        pa.field("sample", pa.int64(), nullable=False),
        pa.field("label", pa.int64(), nullable=False),
        pa.field("expert", pa.string(), nullable=False),
        pa.field("log_probabilities", pa.list_(pa.float16()), nullable=False),
    ]
)


@dataclass(frozen=True)
class Predictions:
    """Log-probabilities of n samples of one split.

    experts: names of the columns. label: true classes, (n,). log_probabilities: (n, experts, classes). base: the base
    model's, (n, classes).
    """

    experts: tuple[str, ...]
    label: NDArray[np.int64]
    log_probabilities: NDArray[np.float16]
    base: NDArray[np.float16]

    def __len__(self) -> int:
        return len(self.label)

    @property
    def probabilities(self) -> NDArray[np.float32]:
        """Probability of every class, (n, experts, classes)."""
        return np.exp(self.log_probabilities.astype(np.float32))

    def select(self, rows: NDArray[np.bool_] | NDArray[np.int64]) -> Predictions:
        """The predictions of some samples only, by mask or by position."""
        return replace(
            self, label=self.label[rows], log_probabilities=self.log_probabilities[rows], base=self.base[rows]
        )

    def of(self, experts: Sequence[str]) -> Predictions:
        """The predictions of some experts only, in the given order. Raises ValueError for one it does not have."""
        columns = [self.experts.index(name) for name in experts]
        return replace(self, experts=tuple(experts), log_probabilities=self.log_probabilities[:, columns])


def prediction_rows(
    split: str, rows: Sequence[int], label: NDArray[np.int64], expert: str, log_probabilities: NDArray[np.float16]
) -> pa.Table:
    """Predictions of one expert as rows of the file. label: (n,). log_probabilities: (n, classes).

    Raises NumericalError on a number that is not finite, ProtocolError when lengths or labels do not fit.
    """
    n = len(rows)
    if log_probabilities.ndim != 2 or log_probabilities.shape[0] != n or len(label) != n:
        raise ProtocolError(
            f"{expert} on {split}: predictions of shape {log_probabilities.shape} and {len(label)} labels for {n} "
            "samples"
        )
    classes = log_probabilities.shape[1]
    if n and not 0 <= int(label.min()) <= int(label.max()) < classes:
        raise ProtocolError(
            f"{expert} on {split}: labels run from {label.min()} to {label.max()} and the model has {classes} classes"
        )
    if not np.isfinite(log_probabilities).all():
        raise NumericalError(
            f"{expert} has a prediction that is not finite on {split}, samples {rows[0]} to {rows[-1]}: the expert's "
            "weights are damaged"
        )
    values = pa.array(log_probabilities.astype(np.float16, copy=False).ravel())
    lists = pa.ListArray.from_arrays(pa.array(np.arange(n + 1, dtype=np.int32) * classes), values)
    columns = [pa.array([split] * n), pa.array(list(rows), pa.int64()), pa.array(label), pa.array([expert] * n), lists]
    return pa.table(columns, schema=PREDICTION_SCHEMA)


def read_prediction_rows(path: Path) -> pa.Table:
    """A file of predictions as it is. Raises CheckpointError when it is missing, damaged or something else."""
    return read_rows(path, PREDICTION_SCHEMA, "predictions")


def read_predictions(path: Path, split: str) -> Predictions | None:
    """Read one split of a file of predictions; None where there is no file, because samples have no true class.

    Raises CheckpointError when the file is damaged or incomplete, ProtocolError when the split is not in it or experts
    were asked about different samples.
    """
    if not path.exists():
        return None
    table = read_prediction_rows(path)
    known = table["split"].unique().to_pylist()
    if split not in known:
        raise ProtocolError(f"{path} has no split {split!r}; {did_you_mean(split, known)}")
    table = table.filter(pc.equal(table["split"], split))
    columns = {name: table.filter(pc.equal(table["expert"], name)) for name in table["expert"].unique().to_pylist()}
    if BASE not in columns:
        raise CheckpointError(f"{path} has no predictions of the base model on {split}: score it first")
    base = columns.pop(BASE)
    sample, label = base["sample"].to_numpy(), base["label"].to_numpy()
    for expert, rows in columns.items():
        if not np.array_equal(rows["sample"].to_numpy(), sample) or not np.array_equal(rows["label"].to_numpy(), label):
            raise CheckpointError(
                f"{path}: {expert} and the base model were not asked about the same samples of {split}"
            )
    of_base = _matrix(base, path)
    return Predictions(tuple(columns), label, _stack(columns, of_base, path), of_base)


def _stack(columns: Mapping[str, pa.Table], base: NDArray[np.float16], path: Path) -> NDArray[np.float16]:
    """Every expert's matrix side by side, (n, experts, classes)."""
    stacked = np.empty((base.shape[0], len(columns), base.shape[1]), np.float16)
    for position, (expert, rows) in enumerate(columns.items()):
        matrix = _matrix(rows, path)
        if matrix.shape != base.shape:
            raise ProtocolError(
                f"{path}: {expert} predicts {matrix.shape[1]} classes and the base model {base.shape[1]}: experts must "
                "have the base model's labels"
            )
        stacked[:, position] = matrix
    return stacked


def _matrix(rows: pa.Table, path: Path) -> NDArray[np.float16]:
    """The lists of a column as one matrix, (n, classes)."""
    lists = rows["log_probabilities"].combine_chunks()
    lengths = set(pc.list_value_length(lists).to_pylist())
    if len(lengths) != 1:
        raise CheckpointError(f"{path} holds predictions of different numbers of classes: delete it and score again")
    matrix: NDArray[np.float16] = lists.flatten().to_numpy().reshape(len(rows), lengths.pop())
    return matrix
