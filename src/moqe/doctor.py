"""What this machine offers to MoQE."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from pathlib import Path

import torch

from moqe.errors import MissingExtra
from moqe.models.processor import cpu_flags, has_vnni
from moqe.runtimes.int8_gain import int8_gain

EXTRAS = {
    "datasets": "hub",
    "onnx": "vision",
    "onnxruntime": "vision",
    "onnxscript": "vision",
    "pillow": "vision",
    "scikit-learn": "vision",
    "compressed-tensors": "test",
    "xllamacpp": "gguf",
}
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
    flags = cpu_flags()
    known = [label for flag, label in CPU_FLAGS.items() if flag in flags]
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processors": str(os.cpu_count()),
        "torch threads": str(torch.get_num_threads()),
        "memory": f"{pages / 2**30:.1f} GiB",
        "free disk here": f"{shutil.disk_usage(Path.cwd()).free / 2**30:.1f} GiB",
        "instructions": ", ".join(known) or "none of those that low-bit kernels use",
        "VNNI": "yes" if has_vnni() else "no, or not known: int8 experts take slower kernels that do not overflow",
        "int8 in ONNX Runtime": _int8(),
    }


def _int8() -> str:
    """What int8 gains here, measured for a second."""
    try:
        return f"{int8_gain():.1f} times as fast as float32 (3x3 convolutions, one image, one thread)"
    except MissingExtra as error:
        return f"not measured: {error}"


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
    found = {}
    for package, extra in EXTRAS.items():
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = f"absent: in MoQE's folder, pip install '.[{extra}]'"
    return found
