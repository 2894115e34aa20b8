"""A recipe's source becomes documents.

    bundled:<name>/<part>   text of the user's own Python, see `bundled.py`
    file.txt, file.md       UTF-8 text, cut into documents at `separator`
    file.jsonl              one JSON object a line; the text is in `column`
    file.parquet            one row a document; the text is in `column`
    folder                  every such file in it, by name; a hub data set on disk if it holds none of them
    owner/name              a data set of the hugging face hub, streamed, through the extra `hub`

A `separator` other than `none` joins rows before it cuts them, because the hub's WikiText has one row a line.

A path that exists wins over the hub. Empty documents are left out before `skip_documents` and `max_documents` count.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice, pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from moqe.data.bundled import bundled_documents
from moqe.data.documents import Document
from moqe.data.hub import hub_rows
from moqe.data_options import BUNDLED
from moqe.errors import DataError, did_you_mean
from moqe.recipe import Source

# ` = Title = `, where ` = = Section = = ` is a section of the same article.
_WIKITEXT_HEADING = re.compile(r"^ ?= [^=\n].*[^=\n] = ?$", re.MULTILINE)
_BLANK_LINES = re.compile(r"\n[ \t]*(?:\n[ \t]*)+")


def read_source(source: Source) -> list[Document]:
    """The documents of a source in their order, labelled with its domain.

    Raises DataError when the source is missing, empty, not UTF-8, malformed, or lacks the column; MissingExtra when it
    needs the hub library.
    """
    last = None if source.max_documents is None else source.skip_documents + source.max_documents
    if source.path.startswith(BUNDLED):
        found = list(islice(bundled_documents(source.path, source.domain), last))
    else:
        texts = ((name, text) for name, text in _documents(source) if text.strip())
        found = [Document(text, source.label, name) for name, text in islice(texts, last)]
    if not found:
        raise DataError(f"{source.path} holds no text: it is empty, or every document of it is")
    chosen = found[source.skip_documents :]
    if not chosen:
        raise DataError(
            f"{source.path} has {len(found)} documents, and skip_documents leaves out {source.skip_documents}: lower it"
        )
    return chosen


def _documents(source: Source) -> Iterator[tuple[str, str]]:
    """(name, text) of every document, lazily. A text file is cut by its reader, rows are joined and cut here."""
    found = _texts(source)
    if source.separator == "none" or Path(source.path).suffix in (".txt", ".md"):
        return found
    return _named(source.path, _cut((text for _, text in found), source, source.path))


def _texts(source: Source) -> Iterator[tuple[str, str]]:
    """(name, text) of every document, lazily."""
    path = Path(source.path).expanduser()
    if path.is_file():
        if path.suffix not in READERS:
            raise DataError(f"{path} is of an unknown kind: use {', '.join(sorted(READERS))}")
        return _named(path, READERS[path.suffix](path, source))
    if path.is_dir():
        files = sorted(child for child in path.rglob("*") if child.suffix in READERS and child.is_file())
        if files:
            return (item for file in files for item in _named(file, READERS[file.suffix](file, source)))
        return _from_hub(str(path), source)
    if path.suffix in READERS or source.path.startswith(("/", ".", "~")) or source.path.count("/") > 1:
        raise DataError(f"{path} does not exist: a source is a file, a folder, a hub id or {BUNDLED}<name>/<part>")
    return _from_hub(source.path, source)


def _named(path: Path | str, texts: Iterable[str]) -> Iterator[tuple[str, str]]:
    return ((f"{path}#{i}", text) for i, text in enumerate(texts))


def _plain(path: Path, source: Source) -> Iterator[str]:
    text = _decoded(path, path.read_bytes())
    if source.separator == "blank":
        yield from _BLANK_LINES.split(text)
    elif source.separator == "wikitext":
        starts = [match.start() for match in _WIKITEXT_HEADING.finditer(text)]
        if not starts:
            raise DataError(f"{path} has no headings of the form ' = Title = ': choose another separator")
        edges = [0, *starts, len(text)] if text[: starts[0]].strip() else [*starts, len(text)]
        yield from (text[first:last] for first, last in pairwise(edges))
    else:
        yield text


def _cut(rows: Iterable[str], source: Source, where: str) -> Iterator[str]:
    """Join rows, which are lines, and cut them again at the source's separator; lazily.

    The hub's WikiText has one row a line, so its articles begin at a row that is a heading.
    """
    starts = _WIKITEXT_HEADING if source.separator == "wikitext" else _BLANK_LINES
    kept, found = "", False
    for row in rows:
        text = kept + (row if row.endswith("\n") else row + "\n")
        edges = [match.start() for match in starts.finditer(text)]
        found = found or bool(edges)
        edges = [edge for edge in edges if edge > 0]
        yield from (text[first:last] for first, last in pairwise([0, *edges]))
        kept = text[edges[-1] if edges else 0 :]
    if source.separator == "wikitext" and not found:
        raise DataError(f"{where} has no headings of the form ' = Title = ': choose another separator")
    yield kept


def _json_lines(path: Path, source: Source) -> Iterator[str]:
    with path.open("rb") as handle:
        for number, line in enumerate(handle, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                row = json.loads(_decoded(path, line))
            except json.JSONDecodeError as error:
                raise DataError(f"{where} is not JSON: {error.msg}") from None
            if not isinstance(row, dict):
                raise DataError(f"{where} is not a JSON object")
            if source.text_column not in row:
                raise _no_column(where, source.text_column, row)
            yield _text(row[source.text_column], where, source.text_column)


def _parquet(path: Path, source: Source) -> Iterator[str]:
    try:
        with pq.ParquetFile(path) as table:
            names = table.schema_arrow.names
            if source.text_column not in names:
                raise _no_column(str(path), source.text_column, names)
            batches = table.iter_batches(columns=[source.text_column])
            for row, value in enumerate(value for batch in batches for value in batch.column(0).to_pylist()):
                yield _text(value, f"{path}, row {row}", source.text_column)
    except pa.ArrowInvalid as error:
        raise DataError(f"{path} cannot be read as parquet: {error}") from None


def _from_hub(path: str, source: Source) -> Iterator[tuple[str, str]]:
    with hub_rows(path, source) as (_, rows):
        return _named(path, _columns(path, rows, source))


def _columns(path: str, rows: Iterable[Mapping[str, object]], source: Source) -> Iterator[str]:
    """The text of every row, fetched as it is asked for."""
    for number, row in enumerate(rows):
        if source.text_column not in row:
            raise _no_column(path, source.text_column, row)
        yield _text(row[source.text_column], f"{path}, row {number}", source.text_column)


def _text(value: object, where: str, column: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: column {column!r} holds {type(value).__name__}, not text")
    return value


def _no_column(where: str, column: str, known: Iterable[str]) -> DataError:
    return DataError(f"{where} has no column {column!r}; {did_you_mean(column, known)}")


def _decoded(path: Path, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: byte {error.start} is {content[error.start]:#04x}") from None


READERS: dict[str, Callable[[Path, Source], Iterator[str]]] = {
    ".txt": _plain,
    ".md": _plain,
    ".jsonl": _json_lines,
    ".parquet": _parquet,
}
