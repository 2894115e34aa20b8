"""What the processor can do, as far as the system tells."""

from __future__ import annotations

from pathlib import Path

_CPU_INFO = Path("/proc/cpuinfo")  # Linux; nothing is known elsewhere


def cpu_flags() -> frozenset[str]:
    """The processor's feature flags by Linux's names; empty on other systems."""
    if not _CPU_INFO.exists():
        return frozenset()
    for line in _CPU_INFO.read_text().splitlines():
        if line.startswith("flags"):
            return frozenset(line.split(":", 1)[1].split())
    return frozenset()


def has_vnni() -> bool:
    """Whether it multiplies 8-bit integers and adds them to 32-bit sums in one instruction; False where unknown."""
    return not cpu_flags().isdisjoint({"avx512_vnni", "avx_vnni"})
