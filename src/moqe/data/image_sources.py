"""A recipe's source becomes images with labels.

    folder                  <class>/<file>, as ImageNet's train and val are; or parquet files
    file.parquet            one row an image: `image` or `img` (bytes, or a struct with `bytes`), and `label`
    owner/name              a data set of the hugging face hub, streamed, through the extra `hub`; columns likewise
    bundled:digits/<part>   handwritten digits that ship with scikit-learn, through the extra `vision`

A label is the index of a class or its name. The images of a folder take turns by class, files by name, so that any
range of them holds all classes alike; rows keep their order. A path that exists wins over the hub.

Images of a folder stay on the disk; those of other sources are kept in memory as they are encoded.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from moqe.bundled.digits import LABELS, digits_images
from moqe.data.class_names import class_indices, first_number
from moqe.data.decoding import is_animated
from moqe.data.hub import hub_rows
from moqe.errors import DataError, did_you_mean
from moqe.recipe import Source
from moqe.store import digest_bytes

log = logging.getLogger("moqe")

DIGITS = "bundled:digits"
SUFFIXES = frozenset({".jpeg", ".jpg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"})
_SPLIT_FOLDERS = frozenset({"train", "training", "val", "valid", "validation", "test"})
_COLUMNS = ("image", "img")


@dataclass(frozen=True)
class Classes:
    """The classes that a base model knows: their number, and their names where it states them."""

    count: int
    names: tuple[str, ...] | None = None


@dataclass(frozen=True)
class ImageDocument:
    """One encoded image: a file on the disk, or its bytes.

    label: index of its class. domain: the class's name in the model, else in the source, else the index. digest: first
    16 hexadecimal digits of the SHA-256 of the encoded image.
    """

    name: str
    label: int
    domain: str
    digest: str
    source: Path | bytes
    size: int = 1

    def content(self) -> bytes:
        """The image as it is encoded. Raises DataError when the file cannot be read."""
        return _content(self.source, self.name)


@dataclass(frozen=True)
class _Table:
    """Rows of (name, image, label), and the class names that they come with."""

    rows: Iterator[tuple[str, Path | bytes, object]]
    names: tuple[str, ...] | None
    numbered: bool = True


def read_images(source: Source, classes: Classes) -> list[ImageDocument]:
    """The images of a source in their order.

    Raises DataError when the source is missing or empty, an image is none, a label is out of range or its name is not
    the model's; MissingExtra when a library is missing.
    """
    table = _table(source)
    indices, own_names = None, {}
    if table.names is not None:
        indices = class_indices(table.names, classes.names, classes.count, source.path, table.numbered)
        own_names = dict(zip(indices, table.names, strict=True))
    skipped = sum(1 for _ in islice(table.rows, source.skip_documents))
    rows = list(islice(table.rows, source.max_documents))
    if not rows:
        raise DataError(
            f"{source.path} has {skipped} images, and skip_documents leaves out {source.skip_documents}: lower it"
            if skipped
            else f"{source.path} holds no images"
        )
    labels = [_label(value, name, table.names, indices, classes) for name, _, value in rows]
    if indices is None and not isinstance(rows[0][2], str):
        first = first_number(set(labels), classes.names, classes.count, source.path)
        labels = [first + label for label in labels]
    documents: list[ImageDocument] = []
    animated: list[str] = []
    for (name, image, _), label in zip(rows, labels, strict=True):
        content = _content(image, name)
        if is_animated(content, name):  # reads the header, so that what is no image is found before hours of work
            animated.append(name)
        domain = own_names.get(label, "") if classes.names is None else classes.names[label]
        documents.append(ImageDocument(name, label, domain or str(label), digest_bytes(content)[:16], image))
    if animated:
        log.warning(
            "%s: %s has several frames (%d such images): the first counts", source.path, animated[0], len(animated)
        )
    return documents


def _content(image: Path | bytes, name: str) -> bytes:
    if isinstance(image, bytes):
        return image
    try:
        return image.read_bytes()
    except OSError as error:
        raise DataError(f"{name} cannot be read: {error.strerror}") from error


def _table(source: Source) -> _Table:
    if source.path.startswith("bundled:"):
        if source.path.split("/")[0] != DIGITS:
            raise DataError(f"unknown bundled images {source.path!r}; {did_you_mean(source.path, [DIGITS])}")
        part = source.path.removeprefix(DIGITS).removeprefix("/")
        digits = ((f"{DIGITS}/{part}#{name}", content, label) for name, content, label in digits_images(part))
        return _Table(digits, LABELS)
    path = Path(source.path).expanduser()
    if path.is_file():
        if path.suffix != ".parquet":
            raise DataError(f"{path} is of an unknown kind: images come from a folder of classes or a parquet file")
        return _parquet([path], source)
    if path.is_dir():
        files = sorted([*path.glob("*.parquet"), *path.glob("data/*.parquet")])
        return _parquet(files, source) if files else _folder(path)
    if path.suffix == ".parquet" or source.path.startswith(("/", ".", "~")) or source.path.count("/") > 1:
        raise DataError(f"{path} does not exist: a source is a folder, a parquet file, a hub id or {DIGITS}/<part>")
    return _hub(source)


def _folder(root: Path) -> _Table:
    """ImageFolder's layout. A file of an unknown suffix is passed over; a class without images is an error."""
    folders = sorted(child for child in root.iterdir() if child.is_dir() and not child.name.startswith("."))
    if not folders:
        raise DataError(f"{root} has no folders: images lie in <class>/<file>, one folder for each class")
    if all(folder.name in _SPLIT_FOLDERS for folder in folders):
        raise DataError(f"{root} holds {', '.join(f.name for f in folders)}, not classes: give one, {folders[0]}")
    files = [sorted(f for f in folder.rglob("*") if f.suffix.lower() in SUFFIXES) for folder in folders]
    for folder, inside in zip(folders, files, strict=True):
        if not inside:
            raise DataError(f"{folder} holds no images ({', '.join(sorted(SUFFIXES))}): fill or remove it")
    turns = (
        (str(inside[turn]), inside[turn], folder.name)
        for turn in range(max(map(len, files)))
        for folder, inside in zip(folders, files, strict=True)
        if turn < len(inside)
    )
    return _Table(turns, tuple(folder.name for folder in folders), numbered=False)


def _parquet(paths: Sequence[Path], source: Source) -> _Table:
    try:
        schema = pq.read_schema(paths[0])
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{paths[0]} cannot be read as parquet: {error}") from None
    column = _column(str(paths[0]), schema.names, source)
    names = _stated_names(schema.metadata or {}, source.label_column)
    return _Table((row for path in paths for row in _parquet_rows(path, column, source.label_column)), names)


def _parquet_rows(path: Path, column: str, label_column: str) -> Iterator[tuple[str, Path | bytes, object]]:
    try:
        with pq.ParquetFile(path) as table:
            number = 0
            for batch in table.iter_batches(batch_size=1024, columns=[column, label_column]):
                values, labels = batch.column(column).to_pylist(), batch.column(label_column).to_pylist()
                for value, label in zip(values, labels, strict=True):
                    where = f"{path}, row {number}"
                    yield where, _bytes(value, where, column), label
                    number += 1
    except (OSError, KeyError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read as parquet with {column} and {label_column}: {error}") from None


def _stated_names(metadata: Mapping[bytes, bytes], label_column: str) -> tuple[str, ...] | None:
    """Class names in what the `datasets` library writes into a parquet file; None where it did not write it."""
    try:
        stated = json.loads(metadata.get(b"huggingface", b"{}"))
        names = stated["info"]["features"][label_column]["names"]
    except (ValueError, KeyError, TypeError):
        return None
    return tuple(str(name) for name in names)


def _hub(source: Source) -> _Table:
    path = source.path
    with hub_rows(path, source) as (datasets, rows):
        features = rows.features or {}
        column = _column(path, list(features), source)
        rows = rows.cast_column(column, datasets.Image(decode=False))
    names = getattr(features[source.label_column], "names", None)
    return _Table(_from_rows(path, rows, column, source.label_column), None if names is None else tuple(names))


def _from_rows(
    path: str, rows: Iterable[Mapping[str, object]], column: str, label_column: str
) -> Iterator[tuple[str, Path | bytes, object]]:
    for number, row in enumerate(rows):
        where = f"{path}#{number}"
        yield where, _bytes(row[column], where, column), row[label_column]


def _column(where: str, columns: Sequence[str], source: Source) -> str:
    """The column that holds the images, after making sure that labels are there too."""
    wanted = [source.column] if source.column else [name for name in _COLUMNS if name in columns] or [_COLUMNS[0]]
    for name in (wanted[0], source.label_column):
        if name not in columns:
            raise DataError(f"{where} has no column {name!r}; {did_you_mean(name, columns)}")
    return wanted[0]


def _bytes(value: object, where: str, column: str) -> bytes:
    content = value.get("bytes") if isinstance(value, Mapping) else value
    if not isinstance(content, bytes):
        raise DataError(f"{where}: column {column!r} holds {type(content).__name__}, not the bytes of an image")
    return content


def _label(
    value: object, where: str, names: Sequence[str] | None, indices: Sequence[int] | None, classes: Classes
) -> int:
    """The model's class index of what a source says: an index, or a name."""
    if isinstance(value, str):
        known = names if names is not None else classes.names
        if known is None or value not in known:
            raise DataError(
                f"{where}: class {value!r} is not one of the model's"
                + (f"; {did_you_mean(value, known)}" if known else ", which has no names: give indices")
            )
        value = list(known).index(value)
    if not isinstance(value, int) or isinstance(value, bool):
        raise DataError(f"{where}: the label is {type(value).__name__}, not the index or the name of a class")
    count = classes.count if indices is None else len(indices)
    if not 0 <= value < count:
        raise DataError(f"{where}: label {value} is out of range: there are {count} classes, from 0 to {count - 1}")
    return value if indices is None else indices[value]
