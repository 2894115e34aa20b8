"""A mixture's experts in llama.cpp, whatever they are stored as: GGUF files as they are, others written as GGUF first.

Written files hold the very same weights (see `moqe.formats.gguf_codes`), lie in the system's temporary folder and are
removed with the runtime that reads them. The full-precision model is written as it is stored. Embeddings and head are
in memory once an expert, because every context of llama.cpp maps its own file.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from pathlib import Path
from typing import Any

from torch import nn

from moqe.errors import ModelError
from moqe.formats.expert_files import ExpertFiles
from moqe.formats.float_checkpoint import FloatFiles
from moqe.formats.gguf_export import write_gguf
from moqe.formats.gguf_files import GgufFiles
from moqe.progress import Progress, Silent
from moqe.runtimes.llamacpp import LlamaCppRuntime
from moqe.runtimes.runtime import Runtime


class LlamaCppEngine:
    """Opens experts of one full-precision model in llama.cpp, on the CPU. Satisfies `TextEngine`.

    model: made from the folder of the base model or of a mixture's shared files, which its config names. Raises
    ModelError for another device than the CPU.
    """

    def __init__(self, model: nn.Module, device: str = "cpu") -> None:
        if device != "cpu":
            raise ModelError(f"llama.cpp runs experts on the CPU here, and {device} was asked for: leave --device out")
        config: Any = model.config
        self._base = Path(config.name_or_path)

    def open(
        self, expert: ExpertFiles | None, name: str, progress: Progress | None = None, in_common: bool = False
    ) -> Runtime:
        """See `TextEngine`; an expert that is no GGUF file is written as one now.

        Raises CheckpointError where its weights have no exact form there, ModelError for architectures without GGUF.
        """
        if isinstance(expert, GgufFiles):
            return LlamaCppRuntime(expert.path, name=name)
        files = expert or FloatFiles(self._base)
        folder = Path(tempfile.mkdtemp(prefix="moqe-"))
        try:
            with (progress or Silent()).track(f"write {name}", 2 * len(files.names())) as advance:
                write_gguf(folder / "expert.gguf", files, self._base, advance=advance)
            runtime = LlamaCppRuntime(folder / "expert.gguf", name=name)
        except BaseException:
            shutil.rmtree(folder)
            raise
        weakref.finalize(runtime, shutil.rmtree, folder, ignore_errors=True)
        return runtime
