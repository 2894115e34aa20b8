"""The seam between a packed weight and the ways to multiply by it, and the choice among them by number of rows.

A way that is best for one token may be the worst for five hundred, and which is best depends on the processor. So the
candidates are timed, on the first inputs that need them, once in a process for each shape, kind of weight, number of
threads and power of two of rows. All candidates of a weight attain the precision that was asked for: the choice decides
about speed, and about results no further than the order of sums.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

log = logging.getLogger("moqe")

Multiply = Callable[[Tensor], Tensor]
_TRIALS = 3
_HOPELESS = 3.0  # a candidate this many times slower than the best is not tried again


class Kernels(Protocol):
    """A weight in memory and the ways to multiply by it."""

    kind: str  # names the layout, and whatever else beside shape decides what is fastest
    shape: tuple[int, int]  # (out, in)

    def candidates(self, rows: int) -> Mapping[str, Multiply]:
        """Ways to make y = x W^T: from (rows, in), any float type, to (rows, out), of a type of their own."""

    def tensors(self) -> tuple[Tensor, ...]:
        """What is held in memory."""


class Choice:
    """Remembers which candidate was fastest. Safe in several threads, which may then measure twice.

    forced: a candidate that is taken wherever it exists, without measuring; for tests and comparisons.
    """

    def __init__(self, forced: str = "") -> None:
        self.forced = forced
        self.fastest: dict[tuple[object, ...], str] = {}
        self._lock = threading.Lock()

    def multiply(self, kernels: Kernels, x: Tensor) -> Tensor:
        """x W^T for x, (rows, in), by the fastest candidate."""
        rows = x.shape[0]
        key = _key(kernels, rows, x.device)
        name = self.fastest.get(key)
        candidates = kernels.candidates(rows)
        if name is None or name not in candidates:
            name = self._fastest(candidates, x)
            with self._lock:
                self.fastest[key] = name
            log.debug("%s %s, %d rows: %s", kernels.kind, kernels.shape, rows, name)
        return candidates[name](x)

    def settled(self, kernels: Kernels, rows: int, device: torch.device) -> Multiply | None:
        """The candidate that is taken for so many rows; None before it was measured."""
        return kernels.candidates(rows).get(self.fastest.get(_key(kernels, rows, device), ""))

    def _fastest(self, candidates: Mapping[str, Multiply], x: Tensor) -> str:
        if len(candidates) == 1:
            return next(iter(candidates))
        if self.forced in candidates:
            return self.forced
        best: dict[str, float] = {}
        for trial in range(_TRIALS):
            for name, multiply in candidates.items():
                if trial and best[name] > _HOPELESS * min(best.values()):
                    continue
                start = time.perf_counter()
                multiply(x)
                _wait(x.device)
                best[name] = min(best.get(name, float("inf")), time.perf_counter() - start)
        return min(best, key=lambda name: best[name])


def _key(kernels: Kernels, rows: int, device: torch.device) -> tuple[object, ...]:
    return (kernels.kind, kernels.shape, device.type, torch.get_num_threads(), rows.bit_length())


@cache
def process_choice() -> Choice:
    """What was measured in this process."""
    return Choice()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
