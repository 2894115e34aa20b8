"""A runtime in a process of its own, so that what else a benchmark has loaded does not slow it.

Two libraries with OpenMP in one process, torch and llama.cpp for example, keep more threads than there are processors.
Then OpenMP lets threads that wait for work sleep at once instead of spinning for a moment, and every product of a small
model pays for waking them.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from types import TracebackType

import torch
from torch import Tensor

from moqe.runtimes.runtime import Runtime


class RuntimeProcess:
    """Generates in another process, which waits without using a processor between calls.

    make: opens the runtime there; it must be picklable. threads: of torch there. Raises RuntimeError when the process
    ends before it answers; what happened stands on its standard error.
    """

    def __init__(self, make: Callable[[], Runtime], threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._ours, theirs = context.Pipe()
        self._process = context.Process(target=_answer, args=(theirs, make, threads), daemon=True)
        self._process.start()
        theirs.close()

    def generate(self, prompt: Tensor, max_new_tokens: int) -> list[int]:
        """What the runtime generates greedily after a prompt, int64 (1, t)."""
        try:
            self._ours.send((prompt[0].tolist(), max_new_tokens))
            found: list[int] = self._ours.recv()
        except (EOFError, OSError) as error:
            raise RuntimeError("a contestant's process ended without an answer") from error
        return found

    def __enter__(self) -> RuntimeProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ours.close()
        self._process.join(timeout=10)
        self._process.kill()


def _answer(questions: Connection, make: Callable[[], Runtime], threads: int) -> None:
    torch.set_num_threads(threads)
    runtime = make()
    while True:
        try:
            prompt, max_new_tokens = questions.recv()
        except EOFError:
            return
        questions.send(runtime.generate(torch.tensor([prompt]), max_new_tokens))
