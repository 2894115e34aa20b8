"""The loss table on disk: written chunk by chunk so that scoring resumes, merged into one parquet file at the end.

A chunk is one expert on a run of consecutive samples of one split. Its part file exists under its final name only
when it is whole. The merged file has a fixed row order and no timestamps: equal losses give equal bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from moqe.data.protocols import SampleLosses, Scored, SplitSamples
from moqe.errors import CheckpointError, NumericalError, ProtocolError, did_you_mean
from moqe.evaluate.loss_table import LossTable
from moqe.evaluate.parquet import read_rows
from moqe.evaluate.predictions import BASE, prediction_rows, read_prediction_rows
from moqe.store import atomic

SCHEMA = pa.schema(
    [
        pa.field(name, kind, nullable=False)
        for name, kind in {
            "sample": pa.int64(),
            "split": pa.string(),
            "document": pa.string(),
            "domain": pa.string(),
            "expert": pa.string(),
            "protocol": pa.string(),
            "metric": pa.string(),
            "loss_sum": pa.float64(),
            "count": pa.int64(),
            "first_half_sum": pa.float64(),
            "first_half_count": pa.int64(),
            "text_bytes": pa.int64(),
            "runtime": pa.string(),
            "protocol_digest": pa.string(),
            "samples_digest": pa.string(),
        }.items()
    ]
)


@dataclass(frozen=True)
class Chunk:
    """Consecutive samples of a split, scored together: their positions are `rows`."""

    expert: str
    split: str
    number: int
    rows: range


class LossTableFile:
    """A loss table under construction: part files in `folder`, one file once merged.

    experts: "base" and the experts' names, in the order of the table. splits: the samples by split name. metrics: what
    is measured of each. runtime: what computes the losses. chunk_samples: samples per part file. Of a split with labels
    the experts' predictions are kept as well.
    """

    def __init__(
        self,
        folder: Path,
        experts: Sequence[str],
        splits: Mapping[str, SplitSamples],
        metrics: Sequence[str],
        runtime: str,
        chunk_samples: int = 16,
    ) -> None:
        self.folder, self.experts, self.splits = folder, tuple(experts), dict(splits)
        self.metrics, self.runtime, self.chunk_samples = tuple(metrics), runtime, chunk_samples

    def chunks(self, expert: str, split: str) -> list[Chunk]:
        """All chunks of one expert and split."""
        n, size = len(self.splits[split]), self.chunk_samples
        return [
            Chunk(expert, split, number, range(start, min(start + size, n)))
            for number, start in enumerate(range(0, n, size))
        ]

    def pending(self, expert: str, split: str) -> Iterator[Chunk]:
        """The chunks of one expert and split that are not scored yet.

        Raises ProtocolError when a part file was measured by another runtime, by another rule or on other samples.
        """
        for chunk in self.chunks(expert, split):
            if not self._part(chunk).exists():
                yield chunk
            else:
                self._read_part(chunk)

    def add(self, chunk: Chunk, scored: Scored) -> None:
        """Write what was measured of a chunk: all metrics under all protocols, a row for each of the chunk's samples.

        Raises NumericalError on a number that is not finite, ProtocolError when protocols, metrics or rows do not fit
        the split, or predictions are missing where samples have labels.
        """
        split = self.splits[chunk.split]
        found_metrics = [("metrics", set(losses), set(self.metrics)) for losses in scored.losses.values()]
        for what, found, wanted in (
            ("protocols", set(scored.losses), set(split.protocol_digests)),
            *found_metrics,
        ):
            if found != wanted:
                raise ProtocolError(
                    f"losses of {chunk.expert} on {chunk.split} came under the {what} {sorted(found)}, "
                    f"and the table holds {sorted(wanted)}"
                )
        if (scored.log_probabilities is None) != (split.label is None):
            lacking = "predictions" if scored.log_probabilities is None else "labels"
            raise ProtocolError(f"{chunk.expert} on {chunk.split} came without {lacking}: both are kept, or neither")
        tables = [
            self._rows(chunk, protocol, metric, scored.losses[protocol][metric])
            for protocol in split.protocol_digests
            for metric in self.metrics
        ]
        if scored.log_probabilities is not None and split.label is not None:  # first: the other part says "done"
            label = split.label[chunk.rows.start : chunk.rows.stop]
            rows = prediction_rows(chunk.split, chunk.rows, label, chunk.expert, scored.log_probabilities)
            with atomic(self._prediction_part(chunk)) as partial:
                pq.write_table(rows, partial, compression="zstd")
        with atomic(self._part(chunk)) as partial:
            pq.write_table(pa.concat_tables(tables), partial, compression="zstd")

    def merge(self, path: Path, predictions: Path | None = None) -> None:
        """Join all parts into the file `path`, ordered by split, protocol, metric, expert and sample.

        predictions: where those go, ordered by split, expert and sample, if there are any.
        Raises CheckpointError when a chunk is missing.
        """
        ordered = []
        for split, samples in self.splits.items():
            by_expert = [
                pa.concat_tables([self._read_part(chunk) for chunk in self.chunks(expert, split)])
                for expert in self.experts
            ]
            for protocol in samples.protocol_digests:
                for metric in self.metrics:
                    ordered += [
                        table.filter(pc.and_(pc.equal(table["protocol"], protocol), pc.equal(table["metric"], metric)))
                        for table in by_expert
                    ]
        labelled = [split for split, samples in self.splits.items() if samples.label is not None]
        if predictions is not None and labelled:
            parts = [
                read_prediction_rows(self._prediction_part(chunk))
                for split in labelled
                for expert in self.experts
                for chunk in self.chunks(expert, split)
            ]
            with atomic(predictions) as partial:
                pq.write_table(pa.concat_tables(parts).combine_chunks(), partial, compression="zstd")
        with atomic(path) as partial:
            pq.write_table(pa.concat_tables(ordered).combine_chunks(), partial, compression="zstd")

    def _part(self, chunk: Chunk) -> Path:
        return self.folder / f"{chunk.expert}-{chunk.split}-{chunk.number:05d}.parquet"

    def _prediction_part(self, chunk: Chunk) -> Path:
        return self.folder / "predictions" / self._part(chunk).name

    def _rows(self, chunk: Chunk, protocol: str, metric: str, losses: SampleLosses) -> pa.Table:
        split, rows = self.splits[chunk.split], chunk.rows
        n = len(rows)
        if len(losses.loss_sum) != n:
            raise ProtocolError(f"{chunk.expert} on {chunk.split}: {len(losses.loss_sum)} losses for {n} samples")
        if not (np.isfinite(losses.loss_sum).all() and np.isfinite(losses.first_half_sum).all()):
            raise NumericalError(
                f"{chunk.expert} has a loss that is not finite on {chunk.split}, samples {rows.start} to "
                f"{rows.stop - 1}: the expert's weights are damaged"
            )
        part = slice(rows.start, rows.stop)
        columns = {
            "sample": list(rows),
            "split": [chunk.split] * n,
            "document": split.document[part],
            "domain": split.domain[part],
            "expert": [chunk.expert] * n,
            "protocol": [protocol] * n,
            "metric": [metric] * n,
            "loss_sum": losses.loss_sum,
            "count": losses.count,
            "first_half_sum": losses.first_half_sum,
            "first_half_count": losses.first_half_count,
            "text_bytes": split.text_bytes[protocol][part],
            "runtime": [self.runtime] * n,
            "protocol_digest": [split.protocol_digests[protocol]] * n,
            "samples_digest": [split.digest] * n,
        }
        return pa.table(columns, schema=SCHEMA)

    def _read_part(self, chunk: Chunk) -> pa.Table:
        """A part file's rows, after checking that they were measured as this table wants."""
        path = self._part(chunk)
        if not path.exists():
            raise CheckpointError(f"{chunk.expert} is not scored on {chunk.split} yet ({path.name} is missing): resume")
        table, split = _read_parquet(path), self.splits[chunk.split]
        found = {
            name: set(table[name].unique().to_pylist())
            for name in ("metric", "runtime", "protocol_digest", "samples_digest")
        }
        wanted = {
            "metric": set(self.metrics),
            "runtime": {self.runtime},
            "protocol_digest": set(split.protocol_digests.values()),
            "samples_digest": {split.digest},
        }
        samples = sorted(set(table["sample"].to_pylist()))
        for name, values in wanted.items():
            if found[name] != values:
                raise ProtocolError(
                    f"{path} was measured with {name} {_join(found[name])} and this table needs {_join(values)}: "
                    f"delete {path.parent} to score again"
                )
        if samples != list(chunk.rows):
            raise ProtocolError(f"{path} holds other samples than this run's: delete {path.parent} to score again")
        return table


def read_losses(path: Path, split: str, protocol: str, metric: str) -> LossTable:
    """Read one metric of one split under one protocol from a merged loss table.

    Raises CheckpointError when the file is missing, damaged or incomplete; ProtocolError when split, protocol or metric
    are not in it or when it mixes runtimes, rules or samples; NumericalError on a loss that is not finite.
    """
    table = _read_parquet(path)
    for name, wanted in (("split", split), ("protocol", protocol), ("metric", metric)):
        known = table[name].unique().to_pylist()
        if wanted not in known:
            raise ProtocolError(f"{path} has no {name} {wanted!r}; {did_you_mean(wanted, known)}")
        table = table.filter(pc.equal(table[name], wanted))
    for name in ("runtime", "protocol_digest", "samples_digest"):
        values = set(table[name].unique().to_pylist())
        if len(values) != 1:
            raise ProtocolError(f"{path} mixes losses of different {name}: {_join(values)}; score all experts alike")
    names: list[str] = table["expert"].unique().to_pylist()
    if BASE not in names:
        raise CheckpointError(f"{path} has no losses of the base model on {split}: score it first")
    columns = {expert: table.filter(pc.equal(table["expert"], expert)) for expert in names}
    base = columns.pop(BASE)
    sample = base["sample"].to_numpy()
    for expert, rows in columns.items():
        if not np.array_equal(rows["sample"].to_numpy(), sample):
            raise CheckpointError(f"{path}: {expert} and the base model were not scored on the same samples of {split}")
        if not np.array_equal(rows["count"].to_numpy(), base["count"].to_numpy()):
            raise ProtocolError(f"{path}: {expert} and the base model were scored on different tokens of {split}")
    loss, first = (_matrix(columns, name, len(base)) for name in ("loss_sum", "first_half_sum"))
    base_loss = base["loss_sum"].to_numpy()
    if not (np.isfinite(loss).all() and np.isfinite(first).all() and np.isfinite(base_loss).all()):
        raise NumericalError(f"{path} holds a loss that is not finite on {split}: score the experts again")
    count, first_count = (base[name].to_numpy().astype(np.float64) for name in ("count", "first_half_count"))
    return LossTable(
        protocol=protocol,
        runtime=base["runtime"][0].as_py(),
        metric=metric,
        experts=tuple(columns),
        loss=loss,
        base=base_loss,
        halves=np.stack([first, loss - first], axis=-1),
        count=count,
        count_halves=np.stack([first_count, count - first_count], axis=-1),
        text_bytes=base["text_bytes"].to_numpy().astype(np.float64),
        sample=sample,
        document=np.asarray(base["document"].to_pylist(), dtype=np.str_),
        domain=np.asarray(base["domain"].to_pylist(), dtype=np.str_),
    )


def _matrix(columns: Mapping[str, pa.Table], name: str, rows: int) -> NDArray[np.float64]:
    """One column of every expert side by side, (rows, experts)."""
    values = [table[name].to_numpy() for table in columns.values()]
    return np.stack(values, axis=1) if values else np.zeros((rows, 0))


def _read_parquet(path: Path) -> pa.Table:
    return read_rows(path, SCHEMA, "a loss table")


def _join(values: set[str]) -> str:
    return " and ".join(sorted(values))
