"""Memory in large pages for what decoding reads from one end to the other at every token.

With ordinary pages of 4 KiB a processor that streams a hundred megabytes asks for twenty-five thousand addresses to be
translated, which in a virtual machine costs about as much as the memory itself. Linux gives pages of 2 MiB to whoever
asks for them (madvise, where /sys/kernel/mm/transparent_hugepage/enabled says `madvise` or `always`). PyTorch asks only
for single tensors of 2 MiB and more, and only with THP_MEM_ALLOC_ENABLE=1; a layer of a small model is smaller. So the
tensors of an expert lie one after the other in a few mappings here. Elsewhere, and on other devices than a CPU, tensors
stay where they are.
"""

from __future__ import annotations

import mmap
from contextlib import suppress

import torch
from torch import Tensor

_PAGE = 2 << 20
_MAPPING = 64 << 20  # address space taken at once; memory is used as it is written to
_ALIGNED = 64  # bytes: of cache lines and of the widest vectors


class LargePages:
    """Keeps tensors next to each other in large pages. A mapping goes when none of its tensors is used any more."""

    def __init__(self) -> None:
        self._mapping: mmap.mmap | None = None
        self._used = 0  # bytes of the mapping

    def keep(self, tensor: Tensor) -> Tensor:
        """The same values in large pages, contiguous; a contiguous tensor itself where there are no such pages."""
        count = tensor.numel()
        size = count * tensor.element_size()
        if tensor.device.type != "cpu" or not hasattr(mmap, "MADV_HUGEPAGE") or not size:
            return tensor.contiguous()
        if self._mapping is None or len(self._mapping) - self._used < size:
            self._mapping, self._used = _mapped(size)
        # A storage of its own, so that whoever counts bytes by storage counts these and not the mapping.
        kept = torch.frombuffer(self._mapping, dtype=tensor.dtype, count=count, offset=self._used).view(tensor.shape)
        self._used += -(-size // _ALIGNED) * _ALIGNED
        return kept.copy_(tensor)


def _mapped(size: int) -> tuple[mmap.mmap, int]:
    """A new mapping, and where its first large page begins, after which there is room for `size` bytes."""
    mapping = mmap.mmap(-1, max(_MAPPING, size) + _PAGE, flags=mmap.MAP_PRIVATE)
    with suppress(OSError):  # a kernel without them: memory like any other
        mapping.madvise(mmap.MADV_HUGEPAGE)
    return mapping, -torch.frombuffer(mapping, dtype=torch.uint8).data_ptr() % _PAGE


class ExpertPages:
    """Where an expert's tensors lie: codes apart from the rest, because they may outlive it in others' hands."""

    def __init__(self) -> None:
        self.codes, self.own = LargePages(), LargePages()
