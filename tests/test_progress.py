"""Progress: every long step announces itself, and what is announced is done."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import moqe
from moqe.progress import Advance
from moqe.store import FileIdentity, digest_file, digest_files


class Recorded:
    """What was announced, in order: [what, steps done, steps announced]."""

    def __init__(self) -> None:
        self.bars: list[list[Any]] = []

    @contextmanager
    def track(self, what: str, total: int) -> Iterator[Advance]:
        bar = [what, 0, total]
        self.bars.append(bar)

        def advance(steps: int) -> None:
            bar[1] += steps

        yield advance

    @property
    def names(self) -> list[str]:
        return [bar[0] for bar in self.bars]

    def finished(self) -> bool:
        return all(done == total for _, done, total in self.bars)


def test_a_build_shows_every_step(recipe_content: dict[str, Any], built: Path, tmp_path: Path) -> None:
    recipe_content["experts"] = [
        {"name": "theirs", "checkpoint": str(built / "experts" / "gptq")},
        {"name": "rtn", "method": "rtn", "scheme": "w4a16", "group_size": 64},
    ]
    shown = Recorded()
    moqe.build(moqe.parse_recipe(recipe_content), tmp_path / "m", progress=shown)
    training = ["train the paper's router", "compare routers", "fit baselines"]
    assert shown.names == [
        "read texts", "cut texts into windows", "digest the base model (MiB)",
        "write what experts share", "digest theirs (MiB)", "calibrate", "complete files",
        "score base", "score theirs", "score rtn", *training, *training,
        "score base", "score theirs", "score rtn", "judge", "digest files (MiB)",
    ]  # fmt: skip
    assert shown.finished()


def test_a_dry_run_that_reads_texts_shows_it(recipe_content: dict[str, Any]) -> None:
    recipe_content["data"]["router_samples"] = None
    shown = Recorded()
    moqe.plan(moqe.parse_recipe(recipe_content), progress=shown)
    assert shown.names == ["read texts", "cut texts into windows"]
    assert shown.finished()


def test_judging_again_and_verifying_show_themselves(built: Path) -> None:
    shown = Recorded()
    moqe.evaluate(built, progress=shown)
    moqe.inspect(built, verify=True, progress=shown)
    names = ["read texts", "cut texts into windows", "digest the base model (MiB)", "verify files (MiB)", "judge"]
    assert shown.names == [*names, "verify files (MiB)"]
    assert shown.finished()


def test_an_opened_mixture_shows_what_it_verifies_loads_and_writes(built: Path) -> None:
    shown = Recorded()
    mixture = moqe.load(built, progress=shown)
    assert shown.names == ["verify files (MiB)"]
    mixture.generate("one two", expert="gptq", max_new_tokens=3)
    assert shown.names == ["verify files (MiB)", "verify files (MiB)", "load gptq", "generate"]
    assert shown.finished()
    assert shown.bars[2][2] > 10


@pytest.mark.parametrize("size", [0, 1, 1 << 20, (1 << 20) + 1])
def test_digests_count_what_they_read(size: int, tmp_path: Path) -> None:
    import hashlib

    (tmp_path / "a").write_bytes(bytes(range(256)) * (size // 256) + b"x" * (size % 256))
    (tmp_path / "b").write_bytes(b"b")
    shown = Recorded()
    digests = digest_files([tmp_path / "a", tmp_path / "b"], "digest", shown)
    assert digests == [hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in "ab"]
    assert digest_file(tmp_path / "a") == digests[0]
    assert shown.finished()


def test_digests_of_many_files_come_in_their_order(tmp_path: Path) -> None:
    import hashlib

    paths = [tmp_path / f"{index}" for index in range(24)]
    for index, path in enumerate(paths):
        path.write_bytes(bytes([index]) * ((index * 7 % 5) * (1 << 19) + index))
    shown = Recorded()
    assert digest_files(paths, "digest", shown) == [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
    assert shown.finished()


def test_a_file_is_read_once_whatever_its_names_and_again_as_soon_as_it_changes(tmp_path: Path) -> None:
    import hashlib

    first, second = tmp_path / "first", tmp_path / "second"
    known: dict[FileIdentity, str] = {}
    first.write_bytes(b"a" * 100)
    second.hardlink_to(first)

    def mebibytes_read() -> int:
        shown = Recorded()
        digests = digest_files([first, second], "digest", shown, known)
        assert digests == [hashlib.sha256(path.read_bytes()).hexdigest() for path in (first, second)]
        assert shown.finished()
        return shown.bars[0][1]

    assert mebibytes_read() == 1
    assert mebibytes_read() == 0
    times = first.stat()
    first.write_bytes(b"b" * 100)
    os.utime(first, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert mebibytes_read() == 1
    second.unlink()
    second.write_bytes(first.read_bytes())
    assert mebibytes_read() == 2


def test_what_experts_share_is_verified_once(built: Path, tmp_path: Path) -> None:
    linked, copied = tmp_path / "linked", tmp_path / "copied"
    for folder, copy in ((linked, os.link), (copied, shutil.copy2)):
        shutil.copytree(built, folder, copy_function=copy)
    read = {}
    for folder in (linked, copied):
        shown = Recorded()
        moqe.load(folder, progress=shown).generate("one two", expert="gptq", max_new_tokens=1)
        read[folder] = shown.bars[1][1]
    assert read[linked] < read[copied]
