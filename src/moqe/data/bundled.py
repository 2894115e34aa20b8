"""Text that every Python ships, read from the user's own Python at run time: three domains, no download.

    bundled:python-code        the source of the standard library's modules, docstrings removed   (domain code)
    bundled:python-docstrings  the docstrings of the same modules, one document per module        (domain docstrings)
    bundled:python-topics      the language reference behind `help("topics")`                     (domain reference)

A part follows the name: `/train` is what the bundled model was trained on and what calibration may read, `/router` and
`/test` are held out and disjoint. The part of a document is a hash of its module's or topic's name, hence the same for
every version of Python, and a module's source and docstrings are always in the same part. Test suites, installed
packages and files that are tables rather than text are left out. Topics quote each other, so a paragraph belongs to
the shortest topic that holds it and is cut from the others.

The text differs a little between versions of Python: a measurement on it belongs to the version that made it.
"""

from __future__ import annotations

import ast
import re
import sysconfig
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path

from moqe.data.documents import Document
from moqe.errors import DataError, did_you_mean
from moqe.store import digest_bytes

PREFIX = "bundled:"
PARTS = ("train", "router", "test")

_SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    | {"distutils", "encodings", "ensurepip", "lib2to3", "pydoc_data"}
)
_SKIPPED_MODULES = ("html.entities", "_sysconfigdata")
_MODULE_HELD_OUT_PERCENT, _TOPIC_HELD_OUT_PERCENT = 14, 36
_MINIMUM_CHARACTERS = 300
_NAMED = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
_DOCUMENTED = _NAMED | ast.Module


def bundled_documents(path: str, domain: str = "") -> Iterator[Document]:
    """The documents of `bundled:<name>/<part>`, read as they are asked for.

    They are labelled `domain`, or the source's own domain, and come in the order of a hash of their names, so that the
    first few are a fair sample. Raises DataError when the name or the part is unknown, or when this Python comes
    without its sources.
    """
    name, _, part = path.removeprefix(PREFIX).partition("/")
    if name not in SOURCES:
        raise DataError(f"unknown bundled text {path!r}; {did_you_mean(name, SOURCES)}")
    if part not in PARTS:
        wanted = ", ".join(f"{PREFIX}{name}/{known}" for known in PARTS)
        raise DataError(f"{path!r} does not say which part to read: choose one of {wanted}")
    label, read = SOURCES[name]
    return (
        Document(text, domain or label, f"{path}#{key}") for key, text in read(part) if len(text) >= _MINIMUM_CHARACTERS
    )


def part_of(name: str, held_out_percent: int) -> str:
    """The part a module or topic belongs to, by its name alone; router and test halve the held-out share."""
    bucket = int(_name_hash(name)[:8], 16) % 100
    if bucket >= held_out_percent:
        return "train"
    return "router" if bucket < held_out_percent // 2 else "test"


def _name_hash(name: str) -> str:
    return digest_bytes(name.encode("utf-8"))


def _code(part: str) -> Iterator[tuple[str, str]]:
    for name, source in _modules(part):
        yield name, _without_docstrings(source)


def _docstrings(part: str) -> Iterator[tuple[str, str]]:
    for name, source in _modules(part):
        parts = [f"{qualified}\n\n{text}" for qualified, text in _documented(ast.parse(source), name)]
        yield name, "\n\n\n".join(parts)


def _topics(part: str) -> Iterator[tuple[str, str]]:
    from pydoc_data.topics import topics

    owned: set[str] = set()
    kept: dict[str, str] = {}
    for name in sorted(topics, key=lambda name: (len(topics[name]), name)):
        paragraphs = [text.rstrip() for text in re.split(r"\n[ \t]*\n", topics[name].strip("\n")) if text.strip()]
        own = [text for text in paragraphs if " ".join(text.split()) not in owned]
        owned.update(" ".join(text.split()) for text in paragraphs)
        kept[name] = "\n\n".join(own)
    for name in sorted(kept, key=_name_hash):
        if part_of(name, _TOPIC_HELD_OUT_PERCENT) == part:
            yield name, kept[name]


SOURCES: dict[str, tuple[str, Callable[[str], Iterator[tuple[str, str]]]]] = {
    "python-code": ("code", _code),
    "python-docstrings": ("docstrings", _docstrings),
    "python-topics": ("reference", _topics),
}


def _library() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _modules(part: str) -> Iterator[tuple[str, str]]:
    """Dotted names and sources of the library's modules in a part, in the order of the names' hashes."""
    named = {}
    for path in _python_files(_library()):
        inner = path.relative_to(_library()).with_suffix("")
        named[".".join(inner.parts).removesuffix(".__init__")] = path
    if not named:
        raise DataError(f"this Python comes without the sources of its library: {_library()} holds none")
    for name, path in sorted(named.items(), key=lambda item: _name_hash(item[0])):
        if part_of(name, _MODULE_HELD_OUT_PERCENT) == part and not name.startswith(_SKIPPED_MODULES):
            with tokenize.open(path) as handle:  # honours the file's coding line
                yield name, handle.read()


def _python_files(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        if path.is_dir() and path.name not in _SKIPPED_FOLDERS:
            yield from _python_files(path)
        elif path.suffix == ".py":
            yield path


def _documented(tree: ast.Module, module: str) -> Iterator[tuple[str, str]]:
    """Qualified names and cleaned docstrings, in the order of the source."""
    pending: list[tuple[str, ast.AST]] = [(module, tree)]
    while pending:
        name, node = pending.pop()
        if isinstance(node, _DOCUMENTED) and (text := ast.get_docstring(node)):
            yield name, text
        inner = [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt | ast.ExceptHandler)]
        pending += [(f"{name}.{child.name}" if isinstance(child, _NAMED) else name, child) for child in inner[::-1]]


def _without_docstrings(source: str) -> str:
    """The source with every docstring cut out; comments and layout stay. A body left empty gets an ellipsis."""
    lines = source.splitlines(keepends=True)
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, _DOCUMENTED) or ast.get_docstring(node, clean=False) is None:
            continue
        first, last = node.body[0].lineno - 1, (node.body[0].end_lineno or node.body[0].lineno) - 1
        before = lines[first].encode()[: node.body[0].col_offset].decode()
        after = lines[last].encode()[node.body[0].end_col_offset :].decode()
        alone = not before.strip() and (not after.strip() or after.lstrip().startswith("#"))
        lines[first : last + 1] = [""] * (last - first + 1)
        if not alone or (len(node.body) == 1 and not isinstance(node, ast.Module)):
            lines[first] = f"{before}...{after}"
    return "".join(lines).strip("\n") + "\n"
