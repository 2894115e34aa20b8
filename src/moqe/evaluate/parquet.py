"""Reading the parquet files of an evaluation, with errors that say what to do."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from moqe.errors import CheckpointError


def read_rows(path: Path, schema: pa.Schema, what: str) -> pa.Table:
    """A whole file whose columns are the schema's; `what` it holds is for messages.

    Raises CheckpointError when it is missing, damaged or something else.
    """
    try:
        table = pq.read_table(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist: score the experts first") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise CheckpointError(f"{path} is not a readable parquet file ({error}): delete it and score again") from error
    if table.schema.names != schema.names:
        raise CheckpointError(f"{path} has other columns than {what}: delete it and score again")
    return table
