from __future__ import annotations

import json
import sys
from types import ModuleType

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moqe.data.sources import read_source
from moqe.errors import DataError, MissingExtra
from moqe.recipe import Source

WIKI = """
 = First = \n \n Text of the first . \n \n = = Section = = \n \n More = of it . \n
 = Second title = \n \n Text of the second . \n
"""


def texts(source: Source) -> list[str]:
    return [document.text for document in read_source(source)]


def test_a_text_file_is_one_document(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    (document,) = read_source(Source(path=str(tmp_path / "a.txt"), domain="notes"))
    assert (document.text, document.domain) == ("one\n\ntwo\n", "notes")
    assert document.name == f"{tmp_path / 'a.txt'}#0"


def test_the_domain_defaults_to_the_path(tmp_path):
    (tmp_path / "a.md").write_text("one")
    assert read_source(Source(path=str(tmp_path / "a.md")))[0].domain == str(tmp_path / "a.md")


def test_blank_lines_separate(tmp_path):
    (tmp_path / "a.txt").write_text("one\nstill one\n\ntwo\n  \n\t\n\nthree\n\n")
    assert texts(Source(path=str(tmp_path / "a.txt"), separator="blank")) == ["one\nstill one", "two", "three"]


def test_wikitext_headings_separate_articles_not_sections(tmp_path):
    (tmp_path / "wiki.txt").write_text(WIKI)
    first, second = texts(Source(path=str(tmp_path / "wiki.txt"), separator="wikitext"))
    assert first.startswith(" = First = ")
    assert "= = Section = =" in first
    assert second.startswith(" = Second title = ")
    assert first + second == WIKI[1:]


def test_text_before_the_first_heading_is_kept(tmp_path):
    (tmp_path / "wiki.txt").write_text("the end of an article\n" + WIKI)
    assert len(texts(Source(path=str(tmp_path / "wiki.txt"), separator="wikitext"))) == 3


def test_wikitext_without_headings_is_an_error(tmp_path):
    (tmp_path / "a.txt").write_text("plain")
    with pytest.raises(DataError, match="no headings"):
        read_source(Source(path=str(tmp_path / "a.txt"), separator="wikitext"))


def test_json_lines(tmp_path):
    rows = [{"body": "one"}, {"body": " "}, {"body": "two"}]
    (tmp_path / "a.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    assert texts(Source(path=str(tmp_path / "a.jsonl"), column="body")) == ["one", "two"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"}\n{"text": ', "line 2 is not JSON"),
        ('{"text": "a"}\n["b"]', "line 2 is not a JSON object"),
        ('{"txt": "a"}', "line 1 has no column 'text'; did you mean 'txt'"),
        ('{"text": 3}', "column 'text' holds int, not text"),
    ],
)
def test_bad_json_lines(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_text(line)
    with pytest.raises(DataError, match=message):
        read_source(Source(path=str(tmp_path / "a.jsonl")))


def test_parquet(tmp_path):
    pq.write_table(pa.table({"content": ["one", "two"], "url": ["u", "v"]}), tmp_path / "a.parquet")
    assert texts(Source(path=str(tmp_path / "a.parquet"), column="content")) == ["one", "two"]
    with pytest.raises(DataError, match="no column 'contents'; did you mean 'content'"):
        read_source(Source(path=str(tmp_path / "a.parquet"), column="contents"))


def test_a_null_in_parquet_is_an_error(tmp_path):
    pq.write_table(pa.table({"text": ["one", None]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="row 1: column 'text' holds NoneType"):
        read_source(Source(path=str(tmp_path / "a.parquet")))


def test_damaged_parquet(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match="cannot be read as parquet"):
        read_source(Source(path=str(tmp_path / "a.parquet")))


def test_a_folder_is_its_files_by_name(tmp_path):
    (tmp_path / "b.txt").write_text("two")
    (tmp_path / "a.md").write_text("one")
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "c.jsonl").write_text('{"text": "three"}')
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    assert texts(Source(path=str(tmp_path))) == ["one", "two", "three"]


def test_a_range_of_documents(tmp_path):
    (tmp_path / "a.txt").write_text("\n\n".join("abcdef"))
    source = Source(path=str(tmp_path / "a.txt"), separator="blank")
    assert texts(source.model_copy(update={"skip_documents": 2, "max_documents": 3})) == ["c", "d", "e"]
    assert texts(source.model_copy(update={"max_documents": 2})) == ["a", "b"]
    with pytest.raises(DataError, match="has 6 documents, and skip_documents leaves out 6"):
        read_source(source.model_copy(update={"skip_documents": 6}))


def test_missing_empty_unknown_and_undecodable_files(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        read_source(Source(path=str(tmp_path / "none.txt")))
    with pytest.raises(DataError, match=r"^none\.txt does not exist"):
        read_source(Source(path="none.txt"))
    (tmp_path / "empty.txt").write_text(" \n\n ")
    with pytest.raises(DataError, match="holds no text"):
        read_source(Source(path=str(tmp_path / "empty.txt")))
    (tmp_path / "a.doc").write_text("one")
    with pytest.raises(DataError, match=r"unknown kind: use \.jsonl, \.md, \.parquet, \.txt"):
        read_source(Source(path=str(tmp_path / "a.doc")))
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    with pytest.raises(DataError, match="not UTF-8 text: byte 2 is 0xef"):
        read_source(Source(path=str(tmp_path / "latin.txt")))


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone")
    assert texts(Source(path=str(tmp_path / "a.txt"))) == ["one"]


def test_the_hub_needs_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtra, match=r"pip install '\.\[hub\]'"):
        read_source(Source(path="owner/name"))


class Rows(list):
    column_names = ("text", "url")


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the hub library that records what it is asked for."""
    module = ModuleType("datasets")
    module.exceptions = ModuleType("datasets.exceptions")
    module.exceptions.DatasetsError = type("DatasetsError", (Exception,), {})
    module.asked = []

    def load_dataset(path, subset, split, streaming):
        assert streaming  # a corpus may be larger than the disk
        module.asked.append((path, subset, split))
        if split == "nowhere":
            raise ValueError("Unknown split\n 'nowhere'")
        return Rows([{"text": "one", "url": "u"}, {"text": "", "url": "v"}, {"text": "two", "url": "w"}])

    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    return module


def test_a_hub_id_is_loaded_with_subset_and_split(hub):
    assert texts(Source(path="owner/name", subset="en", split="test")) == ["one", "two"]
    assert hub.asked == [("owner/name", "en", "test")]


def test_a_folder_without_text_files_is_a_data_set_on_disk(hub, tmp_path):
    (tmp_path / "data.arrow").write_bytes(b"")
    read_source(Source(path=str(tmp_path)))
    assert hub.asked == [(str(tmp_path), None, "train")]


@pytest.mark.usefixtures("hub")
def test_hub_errors_are_data_errors():
    with pytest.raises(DataError, match="'owner/name' cannot be loaded: Unknown split 'nowhere'"):
        read_source(Source(path="owner/name", split="nowhere"))
    with pytest.raises(DataError, match="no column 'txt'; did you mean 'text'"):
        read_source(Source(path="owner/name", column="txt"))


def test_rows_that_are_lines_become_articles(hub):
    lines = ["", " = One = ", "", " a b ", " = = Part = = ", " c ", " = Two = ", " d "]
    hub.load_dataset = lambda *_, **__: Rows({"text": line} for line in lines)
    found = texts(Source(path="owner/name", separator="wikitext", max_documents=2))
    assert [text.split() for text in found] == [
        ["=", "One", "=", "a", "b", "=", "=", "Part", "=", "=", "c"],
        ["=", "Two", "=", "d"],
    ]
