from __future__ import annotations

import ast
import sys
from itertools import islice
from typing import NamedTuple

import pytest

from moqe.data import bundled
from moqe.data.bundled import PARTS, SOURCES, bundled_documents, part_of
from moqe.data.sources import read_source
from moqe.errors import DataError
from moqe.recipe import Source, Specialists

MODULE = '''"""Module text, long enough to be a document."""

import os  # a comment


class Thing:
    """What a thing is."""

    def act(self):
        "One line."
        return os.name  # kept

    def idle(self):
        """Nothing but text."""

    async def late(self): "on the same line"; return 1
'''


class Origin(NamedTuple):
    """What is read of a module's spec."""

    origin: str


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A standard library of our own: two modules, a package, and what is left out."""
    files = {
        "one.py": MODULE,
        "package/__init__.py": MODULE.replace("Thing", "Package"),
        "package/inner.py": "x = 1\n" * 100,
        "test/test_one.py": MODULE,
        "site-packages/other.py": MODULE,
        "encodings/cp1.py": MODULE,
        "_sysconfigdata_x.py": MODULE,
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(bundled.sysconfig, "get_path", lambda name: {"stdlib": str(tmp_path)}[name])
    monkeypatch.setattr(bundled, "_MINIMUM_CHARACTERS", 20)
    monkeypatch.setattr(bundled, "part_of", lambda name, percent: "test")
    return tmp_path


@pytest.mark.usefixtures("library")
def test_code_comes_without_docstrings_but_with_comments():
    found = {document.name.split("#")[1]: document.text for document in bundled_documents("bundled:python-code/test")}
    assert sorted(found) == ["one", "package", "package.inner"]
    code = found["one"]
    assert "import os  # a comment" in code
    assert "return os.name  # kept" in code
    for text in ("Module text", "What a thing", "One line", "Nothing but", "on the same line"):
        assert text not in code
    assert ast.parse(code)
    assert not any(
        ast.get_docstring(node)
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
    )


@pytest.mark.usefixtures("library")
def test_docstrings_carry_their_names_in_the_order_of_the_source():
    found = {d.name.split("#")[1]: d for d in bundled_documents("bundled:python-docstrings/test")}
    assert sorted(found) == ["one", "package"]
    assert found["one"].domain == "docstrings"
    assert found["one"].text == (
        "one\n\nModule text, long enough to be a document.\n\n\none.Thing\n\nWhat a thing is.\n\n\n"
        "one.Thing.act\n\nOne line.\n\n\none.Thing.idle\n\nNothing but text.\n\n\none.Thing.late\n\non the same line"
    )


def test_a_python_without_sources_is_an_error(library):
    for path in sorted(library.rglob("*.py")):
        path.unlink()
    with pytest.raises(DataError, match="without the sources of its library"):
        list(bundled_documents("bundled:python-code/test"))


def test_topics_quote_each_other_only_once(monkeypatch):
    topics = {
        "small": "Shared paragraph\nof two lines.\n\nOwn.",
        "large": "Before.\n\nShared paragraph of\ntwo lines.\n\nAfter.",
    }
    module = type(sys)("pydoc_data.topics")
    module.topics = topics
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", module)
    monkeypatch.setattr(bundled, "_MINIMUM_CHARACTERS", 1)
    monkeypatch.setattr(bundled, "part_of", lambda name, percent: "train")
    found = {d.name.split("#")[1]: d.text for d in bundled_documents("bundled:python-topics/train")}
    assert found == {"small": topics["small"], "large": "Before.\n\nAfter."}


def test_parts_depend_on_the_name_alone_and_have_their_shares():
    names = [f"module_{i}" for i in range(3000)]
    counts = {part: sum(part_of(name, 20) == part for name in names) / len(names) for part in PARTS}
    assert counts["train"] == pytest.approx(0.8, abs=0.03)
    assert counts["router"] == pytest.approx(0.1, abs=0.02)
    assert counts["test"] == pytest.approx(0.1, abs=0.02)
    assert [part_of(name, 14) for name in ("json.decoder", "threading", "ipaddress")] == ["train", "test", "router"]


@pytest.mark.parametrize("name", SOURCES)
def test_held_out_parts_are_disjoint_and_large_enough(name):
    most = None if name.startswith("python-") else 25  # parsing whole packages takes minutes
    found = {part: list(islice(bundled_documents(f"bundled:{name}/{part}"), most)) for part in ("router", "test")}
    assert not {d.digest for d in found["router"]} & {d.digest for d in found["test"]}
    assert all(sum(len(d.text) for d in documents) > 40_000 for documents in found.values())
    assert {d.domain for documents in found.values() for d in documents} == {Source(path=f"bundled:{name}/test").label}


def test_specialists_are_named_after_the_domains_of_bundled_texts():
    names = ["bundled:python-topics/train", "bundled:sympy-code/train"]
    sources = tuple(Source(path=name) for name in names)
    assert Specialists().labels(sources) == ("reference", "sympy-code")
    read = [read_source(source.model_copy(update={"max_documents": 1}))[0].domain for source in sources]
    assert read == ["reference", "sympy-code"]


def test_a_package_that_is_not_there_is_asked_for(monkeypatch):
    monkeypatch.setattr(bundled.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="pip install sympy"):
        list(bundled_documents("bundled:sympy-code/train"))


def test_a_package_is_read_under_its_own_name(tmp_path, monkeypatch):
    for name in ("sympy/__init__.py", "sympy/core/add.py", "sympy/core/tests/test_add.py", "other/one.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(MODULE)
    monkeypatch.setattr(bundled.importlib.util, "find_spec", lambda name: Origin(str(tmp_path / name / "__init__.py")))
    monkeypatch.setattr(bundled, "_MINIMUM_CHARACTERS", 20)
    monkeypatch.setattr(bundled, "part_of", lambda name, percent: "test")
    found = [document.name.split("#")[1] for document in bundled_documents("bundled:sympy-code/test")]
    assert sorted(found) == ["sympy", "sympy.core.add"]


def test_a_source_reads_no_more_than_it_is_asked_for():
    first = read_source(Source(path="bundled:python-code/train", max_documents=3, domain="own"))
    assert [document.domain for document in first] == ["own"] * 3
    second = read_source(Source(path="bundled:python-code/train", skip_documents=1, max_documents=2))
    assert [d.text for d in second] == [d.text for d in first[1:]]


def test_unknown_names_and_parts():
    with pytest.raises(DataError, match="did you mean 'python-code'"):
        bundled_documents("bundled:python-cod/test")
    with pytest.raises(DataError, match="choose one of bundled:python-code/train"):
        bundled_documents("bundled:python-code")
