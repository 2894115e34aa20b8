"""Files: whole or absent, linked once, locked by one."""

from __future__ import annotations

from pathlib import Path

import pytest

from moqe import store
from moqe.errors import CheckpointError, FolderBusy


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    store.write_text(path, "old")

    def fail() -> None:
        with store.atomic(path) as partial:
            partial.write_text("new")
            raise ValueError("half way")

    with pytest.raises(ValueError, match="half way"):
        fail()
    assert path.read_text() == "old"
    assert [found.name for found in tmp_path.iterdir()] == ["file"]


def test_linking_a_symbolic_link_links_its_target(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "a").write_text("content")
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "file").symlink_to("../blobs/a")
    target = tmp_path / "expert" / "file"
    store.link(tmp_path / "snapshot" / "file", target)
    assert not target.is_symlink()
    assert target.read_text() == "content"
    assert target.samefile(tmp_path / "blobs" / "a")


def test_shared_files_count_once(tmp_path: Path) -> None:
    store.write_text(tmp_path / "a", "12345")
    store.link(tmp_path / "a", tmp_path / "b")
    assert store.disk_bytes(tmp_path) == 5


def test_a_refused_lock_leaves_the_folder_to_its_holder(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    with store.locked(folder):
        with pytest.raises(FolderBusy), store.locked(folder):
            pass
        assert folder.exists()
        with pytest.raises(FolderBusy), store.locked(folder):
            pass
    assert not folder.exists()  # nothing came of it
    with store.locked(folder):
        store.write_text(folder / "a", "x")
    assert folder.exists()


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "m").write_text("")
    with pytest.raises(FolderBusy, match="cannot be used as a folder"), store.locked(tmp_path / "m"):
        pass


def test_json_is_canonical_and_damage_is_named(tmp_path: Path) -> None:
    assert store.canonical_hash({"b": 1, "a": [1.0]}) == store.canonical_hash({"a": [1.0], "b": 1})
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"x\.json is not valid JSON"):
        store.read_json(tmp_path / "x.json")
