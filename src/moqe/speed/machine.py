"""Where something was measured: the processor, its instructions, threads, and the versions of what computes."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

from moqe.models.processor import cpu_flags

_PACKAGES = ("moqe", "torch", "transformers", "xllamacpp", "onnxruntime")
_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimddp", "i8mm")
_CPU = Path("/proc/cpuinfo")


def machine(threads: int) -> dict[str, str]:
    """What belongs beside every number of a measurement with `threads` threads."""
    flags = cpu_flags()
    return {
        "processor": _processor(),
        "processors": str(os.cpu_count()),
        "threads": str(threads),
        "instructions": " ".join(flag for flag in _FLAGS if flag in flags) or "not known",
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{package: version for package in _PACKAGES if (version := _version(package))},
    }


def _processor() -> str:
    if _CPU.exists():
        for line in _CPU.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "not known"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
