"""Tensors in large pages: the same values, side by side, aligned, and given back."""

from __future__ import annotations

import gc
import mmap
from pathlib import Path

import pytest
import torch

from moqe.runtimes.packed.pages import LargePages

LINUX = hasattr(mmap, "MADV_HUGEPAGE") and Path("/proc/self/maps").exists()
needs_linux = pytest.mark.skipif(not LINUX, reason="asks Linux for large pages and about mappings")


def test_values_are_kept_and_every_storage_is_the_tensors_own() -> None:
    random = torch.Generator().manual_seed(0)
    pages = LargePages()
    tensors = [
        torch.randint(-128, 128, (33, 7), dtype=torch.int8, generator=random),
        torch.randn(5, 3, generator=random).T,
        torch.randn(4, 2, generator=random).to(torch.bfloat16),
        torch.empty(0, 3),
    ]
    for tensor in tensors:
        kept = pages.keep(tensor)
        assert kept.dtype == tensor.dtype
        assert torch.equal(kept, tensor)
        assert kept.is_contiguous()
        assert kept.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


@needs_linux
def test_neighbours_are_aligned_and_share_a_mapping() -> None:
    pages = LargePages()
    first, second = (pages.keep(torch.ones(100, dtype=torch.uint8)) for _ in range(2))
    assert first.data_ptr() % (2 << 20) == 0
    assert second.data_ptr() - first.data_ptr() == 128
    large = pages.keep(torch.zeros(70 << 20, dtype=torch.uint8))
    assert large.data_ptr() % (2 << 20) == 0
    assert int(first.sum()) == int(second.sum()) == 100


@needs_linux
def test_a_mapping_goes_with_its_last_tensor() -> None:
    def mapped(address: int) -> bool:
        spans = (line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines())
        return any(int(start, 16) <= address < int(end, 16) for start, end in spans)

    pages = LargePages()
    first, second = pages.keep(torch.ones(100)), pages.keep(torch.ones(100))
    address = first.data_ptr()
    del pages, first
    gc.collect()
    assert mapped(address)
    assert float(second.sum()) == 100.0
    del second
    gc.collect()
    assert not mapped(address)


def test_where_there_are_no_large_pages_tensors_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    tensor = torch.arange(6.0).view(2, 3)
    assert LargePages().keep(tensor) is tensor
    assert torch.equal(LargePages().keep(tensor.T), tensor.T)
