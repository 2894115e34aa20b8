"""Files: digests, atomic writes, hard links, the lock of a build folder, room on the disk.

A file that exists under its final name is whole. Everything is written to `<name>.partial` in the same folder, flushed
to the disk and renamed, so a killed process leaves nothing that a later one could take for finished.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from moqe.errors import CheckpointError, DiskFull, FolderBusy
from moqe.progress import Advance, Progress, ignore

PARTIAL = ".partial"
_MEBIBYTE = 1 << 20
_READERS = 4  # files read and hashed at a time


class FileIdentity(NamedTuple):
    """Which file a name stands for, and the state it is in: it has a new one as soon as it is written to."""

    device: int
    inode: int
    size: int
    modified: int  # ns
    changed: int  # ns; unlike `modified`, nobody can set it


def _identity(path: Path) -> FileIdentity:
    found = path.stat()
    return FileIdentity(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def digest_bytes(data: bytes) -> str:
    """SHA-256 of some bytes, hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def digest_file(path: Path, advance: Advance = ignore) -> str:
    """SHA-256 of a file's content, hexadecimal; `advance` is told of every MiB, a last part of one included."""
    state = hashlib.sha256()
    part = memoryview(bytearray(_MEBIBYTE))
    with path.open("rb", buffering=0) as handle:
        while length := handle.readinto(part):
            state.update(part[:length])
            advance(1)
    return state.hexdigest()


def digest_files(
    paths: Sequence[Path], what: str, progress: Progress, known: dict[FileIdentity, str] | None = None
) -> list[str]:
    """SHA-256 of several files, in their order, several at a time; shown as `what`, in MiB.

    A file with several names (hard links) is read once. known: digests of files that were read before, which are not
    read again unless they changed since; what is read now is added.
    """
    known, turn = {} if known is None else known, threading.Lock()
    identities = [_identity(path) for path in paths]
    unread = {file: path for file, path in zip(identities, paths, strict=True) if file not in known}
    with progress.track(f"{what} (MiB)", sum(-(-file.size // _MEBIBYTE) for file in unread)) as advance:

        def one(path: Path) -> str:
            def in_turn(steps: int) -> None:
                with turn:
                    advance(steps)

            return digest_file(path, in_turn)

        with ThreadPoolExecutor(min(_READERS, os.cpu_count() or 1)) as readers:  # hashing leaves Python's lock alone
            known.update(zip(unread, readers.map(one, unread.values()), strict=True))
    return [known[file] for file in identities]


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def canonical_hash(value: Any) -> str:
    """First 16 hexadecimal digits of the SHA-256 of a value's canonical JSON."""
    return digest_bytes(canonical_json(value).encode())[:16]


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` if the block ends well, remove it otherwise.

    Raises DiskFull when the file system runs out of room.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + PARTIAL)
    try:
        yield partial
        descriptor = os.open(partial, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(f"no room left while writing {path}: free some space and run the same command") from error
        raise
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if "No space left on device" in str(error):  # safetensors and pyarrow wrap the system's error in their own
            raise DiskFull(f"no room left while writing {path}: free some space and run the same command") from error
        raise


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    with atomic(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically: two-space indent, sorted keys, newline at the end."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n")


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Raise CheckpointError where the block, which looks into the content of `path`, does not find what it expects."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} is damaged ({type(error).__name__}: {error}): build or copy the mixture again"
        ) from error


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises CheckpointError when it is missing or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}): delete it and build again") from error


def link(source: Path, target: Path) -> None:
    """Make `target` the same file as `source` (hard link), or a copy where the file system has no hard links."""
    if target.exists() and target.samefile(source):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + PARTIAL)
    partial.unlink(missing_ok=True)
    try:
        os.link(os.path.realpath(source), partial)  # of a symbolic link its target, as in the cache of a hub
    except OSError:
        with atomic(target) as copy:
            shutil.copyfile(source, copy)
        return
    partial.replace(target)


def require_room(folder: Path, needed_bytes: int) -> None:
    """Raise DiskFull unless the file system of `folder` has `needed_bytes` free."""
    probe = folder
    while not probe.exists():
        probe = probe.parent
    free = shutil.disk_usage(probe).free
    if free < needed_bytes:
        raise DiskFull(
            f"{folder} needs about {needed_bytes / 2**20:,.0f} MiB and its disk has {free / 2**20:,.0f} MiB free: "
            "free some space or choose another folder"
        )


def disk_bytes(folder: Path) -> int:
    """Bytes of all files under `folder`, a file with several hard links counted once."""
    seen: dict[tuple[int, int], int] = {}
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            status = path.stat()
            seen[(status.st_dev, status.st_ino)] = status.st_size
    return sum(seen.values())


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the build lock of `folder`; the system releases it when the process ends, however it ends.

    Raises FolderBusy when another process holds it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise FolderBusy(f"{folder} cannot be used as a folder ({error.strerror}): choose another") from error
    held = False
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FolderBusy(f"another process is building in {folder}: wait or choose another folder") from error
        if not folder.exists() or os.fstat(handle).st_ino != folder.stat().st_ino:
            raise FolderBusy(f"{folder} was removed by another process just now: run the same command again")
        held = True
        yield
    finally:
        if held:
            with contextlib.suppress(OSError):
                folder.rmdir()  # if nothing came of it; a folder that holds anything stays
        os.close(handle)
