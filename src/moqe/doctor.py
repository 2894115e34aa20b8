"""What this machine offers to MoQE."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
from pathlib import Path

import torch

EXTRAS = {"datasets": "hub", "compressed_tensors": "test", "xllamacpp": "test"}
CPU_FLAGS = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512_vnni": "AVX512-VNNI (int8)",
    "avx_vnni": "AVX-VNNI (int8)",
    "avx512_bf16": "AVX512-BF16",
    "amx_int8": "AMX (int8)",
    "amx_bf16": "AMX (bf16)",
}


def doctor() -> dict[str, dict[str, str]]:
    """Versions, processor, memory, devices and optional packages, as text by section and name."""
    return {"versions": _versions(), "machine": _machine(), "devices": _devices(), "optional": _optional()}


def _versions() -> dict[str, str]:
    names = ("moqe", "torch", "transformers", "tokenizers", "safetensors", "gguf", "numpy")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in names}


def _machine() -> dict[str, str]:
    flags = _cpu_flags()
    known = [label for flag, label in CPU_FLAGS.items() if flag in flags]
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processors": str(os.cpu_count()),
        "torch threads": str(torch.get_num_threads()),
        "memory": f"{pages / 2**30:.1f} GiB",
        "free disk here": f"{shutil.disk_usage(Path.cwd()).free / 2**30:.1f} GiB",
        "instructions": ", ".join(known) or "none of those that low-bit kernels use",
    }


def _devices() -> dict[str, str]:
    found = {"cpu": "available"}
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            found[f"cuda:{index}"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    else:
        found["cuda"] = "not available"
    return found


def _optional() -> dict[str, str]:
    return {
        package: importlib.metadata.version(package.replace("_", "-"))
        if importlib.util.find_spec(package)
        else f"absent: pip install 'moqe[{extra}]'"
        for package, extra in EXTRAS.items()
    }


def _cpu_flags() -> set[str]:
    """The processor's feature flags where the system tells them (Linux), else nothing."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return set()
    for line in path.read_text().splitlines():
        if line.startswith("flags"):
            return set(line.split(":", 1)[1].split())
    return set()
