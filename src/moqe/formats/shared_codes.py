"""Codes that several experts have in common, in memory once.

Experts that share codes have hard links to one file of codes, so a file's identity (device and inode) says what is
shared. Tensors of such a file are views of one mapping: the safetensors library maps a file privately and copies
nothing, so their bytes are the system's page cache, read when first touched and dropped under pressure. Two mappings of
one file would share those pages too, but each counts as resident memory of the process, and copies on another device
would really be two.

    codes = SharedCodes()                # one a mixture
    lease = codes.lease()                # one an expert that is loaded
    lease.tensor(path, name)             # the same tensor for every lease on the same file

A file stays mapped while any lease on it lives.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from pathlib import Path
from weakref import WeakValueDictionary

from torch import Tensor

from moqe.errors import CheckpointError
from moqe.formats.safetensors_folder import MappedFile

Identity = tuple[int, int]


def identity(path: Path) -> Identity:
    """Device and inode of a file: equal for hard links to it. Raises CheckpointError when there is no such file."""
    try:
        status = path.stat()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}): build or copy the mixture again") from error
    return status.st_dev, status.st_ino


def in_common(files: Iterable[Path], folders: Iterable[Path]) -> bool:
    """Whether one of the files is, as a hard link, also a safetensors file of one of the folders."""
    ours = {identity(path) for path in files}
    theirs = (path for folder in folders for path in folder.glob("*.safetensors") if path.is_file())
    return any(identity(path) in ours for path in theirs)


class SharedCodes:
    """The files of codes that are mapped now. device: where their tensors are. Safe in several threads."""

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self._open: WeakValueDictionary[Identity, _SharedFile] = WeakValueDictionary()
        self._lock = threading.Lock()

    def lease(self) -> Lease:
        """A hold on files, for one user of them."""
        return Lease(self)

    def file(self, path: Path) -> _SharedFile:
        """The mapping of a file, made when nobody holds one. Raises CheckpointError when the file is damaged."""
        key = identity(path)
        with self._lock:
            file = self._open.get(key)
            if file is None:
                file = self._open[key] = _SharedFile(path, self.device)
            return file


class Lease:
    """Keeps the files whose tensors it gave mapped and in common with other leases, until it is dropped."""

    def __init__(self, codes: SharedCodes) -> None:
        self._codes = codes
        self._files: dict[Path, _SharedFile] = {}

    def tensor(self, path: Path, name: str) -> Tensor:
        """A tensor of a file, not to be changed. Raises CheckpointError when it is absent or the file is damaged."""
        if path not in self._files:
            self._files[path] = self._codes.file(path)
        return self._files[path].tensor(name)


class _SharedFile:
    """A mapped file and the tensors that were asked for."""

    def __init__(self, path: Path, device: str) -> None:
        self._file, self._device = MappedFile(path), device
        self._tensors: dict[str, Tensor] = {}
        self._lock = threading.Lock()

    def tensor(self, name: str) -> Tensor:
        """One tensor on the device, the same at every call."""
        with self._lock:
            if name not in self._tensors:
                self._tensors[name] = self._file.tensor(name).to(self._device)
            return self._tensors[name]
