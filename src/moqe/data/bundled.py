"""Text that every installation has, read from the user's own Python at run time: several domains, no download.

    bundled:python-code        the source of the standard library's modules, docstrings removed   (domain code)
    bundled:python-docstrings  the docstrings of the same modules, one document per module        (domain docstrings)
    bundled:python-topics      the language reference behind `help("topics")`                     (domain reference)
    bundled:<package>-code     the same of a package that MoQE depends on                 (domain <package>-code)
    bundled:<package>-docstrings                                                          (domain <package>-docstrings)

A part follows the name: `/train` is what the bundled model was trained on and what calibration may read, `/router` and
`/test` are held out and disjoint. Of packages the bundled model has seen nothing. The part of a document is a hash of
its module's or topic's name, hence the same for every version of Python, and a module's source and docstrings are
always in the same part. Test suites, installed packages (in the library's own texts) and files that are tables rather
than text are left out. Topics quote each other, so a paragraph belongs to the shortest topic that holds it and is cut
from the others.

The text differs a little between versions of Python and of packages: a measurement on it belongs to the versions that
made it.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import sysconfig
import tokenize
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from moqe.data.documents import Document
from moqe.data_options import BUNDLED, bundled_domain
from moqe.errors import DataError, did_you_mean
from moqe.store import digest_bytes

PARTS = ("train", "router", "test")

_SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    | {"distutils", "encodings", "ensurepip", "lib2to3", "pydoc_data"}
)
_SKIPPED_MODULES = ("html.entities", "_sysconfigdata")
_MODULE_HELD_OUT_PERCENT, _TOPIC_HELD_OUT_PERCENT, _PACKAGE_HELD_OUT_PERCENT = 14, 36, 60
PACKAGES = ("matplotlib", "networkx", "scipy", "sympy")  # what MoQE and torch depend on, with much text of their own
_MINIMUM_CHARACTERS = 300
_NAMED = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
_DOCUMENTED = _NAMED | ast.Module


def bundled_documents(path: str, domain: str = "") -> Iterator[Document]:
    """The documents of `bundled:<name>/<part>`, read as they are asked for.

    They are labelled `domain`, or the source's own domain, and come in the order of a hash of their names, so that the
    first few are a fair sample. Raises DataError when the name or the part is unknown, when this Python comes without
    its sources, or when the package is not installed.
    """
    name, _, part = path.removeprefix(BUNDLED).partition("/")
    if name not in SOURCES:
        raise DataError(f"unknown bundled text {path!r}; {did_you_mean(name, SOURCES)}")
    if part not in PARTS:
        wanted = ", ".join(f"{BUNDLED}{name}/{known}" for known in PARTS)
        raise DataError(f"{path!r} does not say which part to read: choose one of {wanted}")
    label, read = domain or bundled_domain(path), SOURCES[name]
    return (Document(text, label, f"{path}#{key}") for key, text in read(part) if len(text) >= _MINIMUM_CHARACTERS)


def part_of(name: str, held_out_percent: int) -> str:
    """The part a module or topic belongs to, by its name alone; router and test halve the held-out share."""
    bucket = int(_name_hash(name)[:8], 16) % 100
    if bucket >= held_out_percent:
        return "train"
    return "router" if bucket < held_out_percent // 2 else "test"


def _name_hash(name: str) -> str:
    return digest_bytes(name.encode("utf-8"))


def _code(part: str, package: str = "") -> Iterator[tuple[str, str]]:
    for name, source in _modules(part, package):
        yield name, _without_docstrings(source)


def _docstrings(part: str, package: str = "") -> Iterator[tuple[str, str]]:
    for name, source in _modules(part, package):
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


SOURCES: dict[str, Callable[[str], Iterator[tuple[str, str]]]] = {
    "python-code": _code,
    "python-docstrings": _docstrings,
    "python-topics": _topics,
    **{
        f"{package}-{kind}": partial(read, package=package)
        for package in PACKAGES
        for kind, read in (("code", _code), ("docstrings", _docstrings))
    },
}


def _library(package: str) -> Path:
    """The folder above a package's modules; of the standard library for an empty name."""
    if not package:
        return Path(sysconfig.get_path("stdlib"))
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise DataError(f"the package {package} is not installed, whose text is asked for: pip install {package}")
    return Path(found.origin).parent.parent


def _modules(part: str, package: str) -> Iterator[tuple[str, str]]:
    """Dotted names and sources of the library's or a package's modules in a part, in the order of the names' hashes."""
    library, named = _library(package), {}
    for path in _python_files(library / package):
        inner = path.relative_to(library).with_suffix("")
        named[".".join(inner.parts).removesuffix(".__init__")] = path
    if not named:
        raise DataError(f"this Python comes without the sources of its library: {library / package} holds none")
    held_out = _PACKAGE_HELD_OUT_PERCENT if package else _MODULE_HELD_OUT_PERCENT
    for name, path in sorted(named.items(), key=lambda item: _name_hash(item[0])):
        if part_of(name, held_out) == part and not name.startswith(_SKIPPED_MODULES):
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
