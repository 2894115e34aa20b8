"""Running a language expert: which engines there are, and what experts on the same engine share."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
from torch import nn

from moqe.errors import MoqeError
from moqe.formats.expert_files import ExpertFiles
from moqe.formats.shared_codes import SharedCodes
from moqe.progress import Progress
from moqe.runtimes.llamacpp_engine import LlamaCppEngine
from moqe.runtimes.packed.parts import PackedSkeleton
from moqe.runtimes.packed.runtime import COMPILED, PRECISIONS, PackedRuntime
from moqe.runtimes.reference import ReferenceRuntime
from moqe.runtimes.runtime import Runtime


class TextEngine(Protocol):
    """Opens experts on one full-precision model, whose tensors around the blocks they share."""

    def open(
        self, expert: ExpertFiles | None, name: str, progress: Progress | None = None, in_common: bool = False
    ) -> Runtime:
        """The runtime of an expert, or of the model itself where `expert` is None; nothing is loaded yet.

        name: for errors. in_common: another expert of this engine has the same files of codes.
        """


class ReferenceEngine:
    """Experts on the reference runtime; those with codes in common keep them packed. Satisfies `TextEngine`."""

    def __init__(self, products: torch.dtype, model: nn.Module, device: str = "cpu") -> None:
        self._products, self._model, self._codes = products, model, SharedCodes(device)

    def open(
        self, expert: ExpertFiles | None, name: str, progress: Progress | None = None, in_common: bool = False
    ) -> Runtime:
        """See `TextEngine`."""
        codes = self._codes if in_common else None
        return ReferenceRuntime(self._model, expert, name=name, progress=progress, codes=codes, products=self._products)


class PackedEngine:
    """Experts on the packed runtime, equal codes in memory once. Satisfies `TextEngine`.

    compiled: whether steps of decoding are. Raises ModelError for a model that the packed runtime cannot run, MoqeError
    where steps cannot be compiled.
    """

    def __init__(
        self, precision: torch.dtype, model: nn.Module, device: str = "cpu", *, compiled: bool = False
    ) -> None:
        if compiled and device == "cpu":
            require_compiler()
        self._skeleton = PackedSkeleton(model, precision, compiled=compiled)

    def open(
        self, expert: ExpertFiles | None, name: str, progress: Progress | None = None, in_common: bool = False
    ) -> Runtime:
        """See `TextEngine`."""
        return PackedRuntime(self._skeleton, expert, name=name, progress=progress)


def require_compiler() -> None:
    """Raise MoqeError where torch.compile would find no compiler for the processor: it looks for one name only."""
    wanted = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if not shutil.which(wanted):
        raise MoqeError(
            f"the runtime {COMPILED} compiles for this processor and finds no {wanted}: install a C++ compiler, name "
            "one in the environment variable CXX, or use packed"
        )


TEXT_RUNTIMES: dict[str, Callable[[nn.Module, str], TextEngine]] = {
    "reference": partial(ReferenceEngine, torch.float32),
    "bfloat16": partial(ReferenceEngine, torch.bfloat16),
    **{name: partial(PackedEngine, precision) for name, precision in PRECISIONS.items()},
    COMPILED: partial(PackedEngine, PRECISIONS["packed"], compiled=True),
    "llama.cpp": LlamaCppEngine,
}
"""By the name that stands beside their numbers: (model, device) to an engine."""
