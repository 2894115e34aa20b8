"""How much memory a mixture of experts that share codes takes: a formula, from the headers of its files.

    total = shared + codes + the sum of the experts' own + objects + working

Codes of four bits take half a byte a weight, two-byte scales of groups of 64 take 1/32: a further expert costs a
sixteenth of the first one's codes. What is not in it is what any one model takes too: the interpreter, activations, the
cache of keys and values. Codes and scales are pages of mapped files: where memory is short the system drops them and
reads them again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from moqe.formats.compressed_tensors_files import CompressedTensorsFiles
from moqe.formats.safetensors_folder import read_header
from moqe.formats.shared_codes import identity

_FLOAT = 4  # bytes of what the reference runtime computes in
_OBJECTS = 7_500  # bytes of module objects to a linear: measured, torch 2.13, decoders of seven linears a block


@dataclass(frozen=True)
class Resident:
    """Bytes in memory once every expert was used.

    shared: the model around the blocks, in float32. codes: integer codes and zero points as stored, those that several
    experts have in common once. own: for every expert its scales, as stored, unless they are in a file that an earlier
    expert has too, and its other parameters in float32.
    objects: what torch keeps for the modules of every expert's copy, estimated.
    working: the largest weight in float32, made when a layer runs and dropped after it.
    """

    shared: int
    codes: int
    own: Mapping[str, int]
    objects: int
    working: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.shared + self.codes + sum(self.own.values()) + self.objects + self.working


def resident_bytes(shared: Path, experts: Mapping[str, CompressedTensorsFiles]) -> Resident:
    """What experts, by name, take in runtimes on one `SharedCodes`.

    shared: the safetensors file of what lies around the blocks. Raises CheckpointError when a file is missing.
    """
    around = sum(math.prod(entry["shape"]) for entry in read_header(shared).values())
    held: set[tuple[int, int, str]] = set()
    codes = 0
    own: dict[str, int] = {}
    linears = largest = 0
    for expert, files in experts.items():
        own[expert] = 0
        for part in files.parts():
            key = (*identity(part.path), part.name)
            if part.kind == "floats":
                own[expert] += _FLOAT * part.values
            elif key not in held and part.kind == "scales":
                own[expert] += part.bytes
            elif key not in held:
                codes += part.bytes
            held.add(key)
            if part.kind == "codes":
                linears, largest = linears + 1, max(largest, part.values)
    return Resident(_FLOAT * around, codes, own, _OBJECTS * linears, _FLOAT * largest)
