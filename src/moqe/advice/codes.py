"""Integer codes of every width from one calibration pass, as experts' folders that distillation opens."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from moqe.data.samples import TextSamples
from moqe.errors import RecipeError
from moqe.formats.compressed_tensors import CompressedTensorsWriter
from moqe.methods import check
from moqe.methods.block import quantize_block
from moqe.models.calibration import CalibratedBlock, calibrate
from moqe.models.decoder import Decoder
from moqe.progress import Progress
from moqe.recipe import Expert
from moqe.schemes import SCHEMES

GROUP_SIZE = 64
SCALE_BITS = 16
WIDTHS = {
    found.weight_bits: found.name for found in SCHEMES.values() if not found.is_block and found.activation_bits == 16
}
CODE_SHARE = 0.35  # of the time may go into codes; beyond that their grids are not searched, a quarter of the work
GPTQ, MINMAX, RTN = "gptq", "gptq-minmax", "rtn"


def check_bits(bits: Sequence[int]) -> tuple[int, ...]:
    """The widths in ascending order, each once. Raises RecipeError on one that has no scheme."""
    if not bits:
        raise RecipeError("there are no bits to advise on: give some, for example 3 4")
    for wanted in bits:
        if wanted not in WIDTHS:
            raise RecipeError(f"no integer scheme has {wanted} bits: choose from {', '.join(map(str, sorted(WIDTHS)))}")
    return tuple(sorted(set(bits)))


def expert_of(bits: int, method: str) -> Expert:
    """The generalist of a width: group 64, asymmetric. A layer that does not fit is rounded to nearest."""
    options = {"gptq": {"grid": "minmax"}} if method == MINMAX else {}
    name = RTN if method == RTN else GPTQ
    content = {"name": f"w{bits}", "method": name, "scheme": WIDTHS[bits], "group_size": GROUP_SIZE}
    return Expert.model_validate(content | {"symmetric": False, "on_unsupported": "rtn"} | options)


def bits_per_weight(bits: int) -> float:
    """Stored bits per weight of codes, zero points and one set of scales."""
    return check(expert_of(bits, RTN)).bits_per_weight(GROUP_SIZE)


def scale_bits_per_weight() -> float:
    """Stored bits per weight of one more set of scales."""
    return SCALE_BITS / GROUP_SIZE


@dataclass(frozen=True)
class Codes:
    """Where the codes of each width are, and the method that made them."""

    folders: dict[int, Path]
    methods: dict[int, str]
    cut: str  # what was done differently for want of time; empty if nothing


def make_codes(
    decoder: Decoder,
    samples: TextSamples,
    bits: Sequence[int],
    folder: Path,
    shared: Path,
    seconds: float,
    progress: Progress,
    products: torch.dtype = torch.float32,
) -> Codes:
    """Quantize the base at every width, the blocks walked once, and write `<folder>/w<bits>`.

    8 bits and more are rounded to nearest, which loses nothing worth a search. seconds: of the whole advice. products:
    of the statistics, see `calibrate`.
    """
    methods = {width: GPTQ if width < 8 else RTN for width in bits}
    cut = ""
    for block in calibrate(decoder, samples, products=products, progress=progress):
        before = time.monotonic()
        _write(decoder, block, methods, folder, shared)
        forecast = (time.monotonic() - before) * decoder.number_of_blocks
        if block.index == 0 and forecast > CODE_SHARE * seconds and GPTQ in methods.values():
            cut = f"codes: gptq on min-max grids, because searching grids would take {forecast / 60:.1f} minutes"
            methods = {width: MINMAX if method == GPTQ else method for width, method in methods.items()}
            shutil.rmtree(folder)
            _write(decoder, block, methods, folder, shared)
    for width in bits:
        _writer(decoder, width, folder, shared).finish()
    return Codes({width: folder / f"w{width}" for width in bits}, methods, cut)


def _writer(decoder: Decoder, bits: int, folder: Path, shared: Path) -> CompressedTensorsWriter:
    scheme = check(expert_of(bits, RTN))
    return CompressedTensorsWriter(folder / f"w{bits}", decoder.folder, shared, scheme, decoder.number_of_blocks)


def _write(decoder: Decoder, block: CalibratedBlock, methods: dict[int, str], folder: Path, shared: Path) -> None:
    scale_dtype = torch.float16 if decoder.stored_dtype == torch.float16 else torch.bfloat16
    for bits, method in methods.items():
        expert = expert_of(bits, method)
        result = quantize_block(
            block.module,
            block.groups,
            block.statistics,
            expert,
            check(expert),
            prefix=block.name,
            scale_dtype=scale_dtype,
            parameter_dtype=decoder.stored_dtype,
        )
        _writer(decoder, bits, folder, shared).write(block.index, result.tensors)
