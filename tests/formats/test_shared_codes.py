from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
import torch

from moqe.errors import CheckpointError
from moqe.formats.safetensors_folder import save_tensors
from moqe.formats.shared_codes import SharedCodes, identity, in_common


@pytest.fixture
def linked(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A file, a hard link to it in another folder, and a copy in a third."""
    paths = [tmp_path / name / "codes.safetensors" for name in ("a", "b", "c")]
    for path in paths:
        path.parent.mkdir()
    for path in (paths[0], paths[2]):
        save_tensors(path, {"x": torch.arange(4096, dtype=torch.int32), "y": torch.ones(3)})
    os.link(paths[0], paths[1])
    return paths[0], paths[1], paths[2]


def test_links_to_one_file_give_the_same_tensor_and_copies_do_not(linked: tuple[Path, Path, Path]) -> None:
    codes = SharedCodes()
    leases = [codes.lease() for _ in linked]
    tensors = [lease.tensor(path, "x") for lease, path in zip(leases, linked, strict=True)]
    assert tensors[0] is tensors[1]
    assert tensors[0].data_ptr() != tensors[2].data_ptr()
    assert torch.equal(tensors[0], tensors[2])
    assert SharedCodes().lease().tensor(linked[0], "x").data_ptr() != tensors[0].data_ptr()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's list of mappings")
def test_a_file_is_mapped_once_and_until_the_last_lease_is_dropped(linked: tuple[Path, Path, Path]) -> None:
    def mappings() -> int:
        gc.collect()
        return Path("/proc/self/maps").read_text().count(str(linked[0].parent.parent))

    codes = SharedCodes()
    first, second = codes.lease(), codes.lease()
    for _ in range(2):
        first.tensor(linked[0], "x")
        second.tensor(linked[1], "x")
        second.tensor(linked[1], "y")
    assert mappings() == 1
    del first
    assert mappings() == 1
    kept = second.tensor(linked[0], "x")
    del second
    assert mappings() == 1
    assert int(kept[-1]) == 4095  # a tensor that somebody holds outlives the lease
    del kept
    assert mappings() == 0
    assert len(codes._open) == 0


def test_what_is_in_common_is_told_by_identity(linked: tuple[Path, Path, Path]) -> None:
    a, b, c = linked
    assert identity(a) == identity(b) != identity(c)
    assert in_common({a}, [c.parent, b.parent])
    assert not in_common({a}, [c.parent])
    assert not in_common(set(), [b.parent])
    (c.parent / "dangling.safetensors").symlink_to("nowhere")
    assert not in_common({a}, [c.parent])


def test_files_that_are_missing_or_damaged_are_named(linked: tuple[Path, Path, Path]) -> None:
    lease = SharedCodes().lease()
    with pytest.raises(CheckpointError, match=r"codes\.safetensors cannot be read.*again"):
        lease.tensor(linked[0].with_name("no") / "codes.safetensors", "x")
    linked[2].write_bytes(b"no header")
    with pytest.raises(CheckpointError, match=r"c/codes\.safetensors cannot be read.*again"):
        lease.tensor(linked[2], "x")
    with pytest.raises(CheckpointError, match=r"a/codes\.safetensors cannot be read.*z"):
        lease.tensor(linked[0], "z")
