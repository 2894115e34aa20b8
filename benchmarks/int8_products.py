"""PyTorch's ways to multiply a few rows by int8 weights, on as many weights as come from memory and not from a cache.

    python -m benchmarks.int8_products [--rows 1 8 512] [--threads 2] [--rounds 11] [--out docs/performance.md]

Weights have SmolLM2-135M's shapes, all of its 30 blocks (106 MB). Every contestant holds its own copy; products are
made one after the other, as in decoding, without what lies between them. FBGEMM's and oneDNN's products are given the
same integers, as unsigned inputs around a zero point of 128, and a line says whether their sums are exact.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.interleaved import Spread, ratios, seconds_per_round
from benchmarks.tables import table, write_section
from moqe.speed.machine import machine

SHAPES, BLOCKS = ((960, 576), (576, 576), (3072, 576), (576, 1536)), 30  # (out, in)
REFERENCE = "_int_mm"
Multiply = Callable[[Tensor], Tensor]  # integers in float32, (rows, in), to sums, (rows, out)


def integers(weight: Tensor) -> Multiply:
    """`torch._int_mm`, which the packed runtime uses for many rows."""
    transposed = weight.t()
    return lambda x: torch._int_mm(x.to(torch.int8), transposed)


def columns(weight: Tensor) -> Multiply:
    """The same with the weight on the left, which it uses for few rows."""
    return lambda x: torch._int_mm(weight, x.to(torch.int8).t()).t()


def vectors(weight: Tensor) -> Multiply:
    """`torch._weight_int8pack_mm`, in bfloat16."""
    scale = torch.ones(len(weight), dtype=torch.bfloat16)
    return lambda x: torch._weight_int8pack_mm(x.to(torch.bfloat16), weight, scale)


def fbgemm(weight: Tensor) -> Multiply:
    """FBGEMM, whose packed weight is an object of its own beside the codes that other ways need."""
    rows = len(weight)
    torch.backends.quantized.engine = "fbgemm"
    zeros, ones = torch.zeros(rows, dtype=torch.int64), torch.ones(rows, dtype=torch.float64)
    stored = torch._make_per_channel_quantized_tensor(weight, ones, zeros, 0)
    packed = torch.ops.quantized.linear_prepack(stored, None)
    one, zero = torch.tensor(1.0), torch.tensor(128)
    multiply = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
    return lambda x: multiply(x, one, zero, packed)


def onednn(weight: Tensor) -> Multiply:
    """oneDNN with prepacked weights and uint8 inputs."""
    packed = torch.ops.onednn.qlinear_prepack(weight, None)
    scale, zero = torch.ones(len(weight)), torch.zeros(len(weight), dtype=torch.int64)
    multiply = torch.ops.onednn.qlinear_pointwise
    fixed: Any = (packed, scale, zero, None, 1.0, 0, torch.float32, "none", [], "")
    return lambda x: multiply((x + 128).to(torch.uint8), 1.0, 128, *fixed)


def floats(dtype: torch.dtype, weight: Tensor) -> Multiply:
    """An ordinary product."""
    wide = weight.to(dtype)
    return lambda x: nn.functional.linear(x.to(dtype), wide)


WAYS: dict[str, Callable[[Tensor], Multiply]] = {
    REFERENCE: integers,
    f"{REFERENCE}, inputs as columns": columns,
    "_weight_int8pack_mm": vectors,
    "FBGEMM": fbgemm,
    "oneDNN qlinear": onednn,
    "bfloat16": partial(floats, torch.bfloat16),
    "float32": partial(floats, torch.float32),
}


def measure(rows: int, rounds: int, seconds_per_turn: float) -> list[list[str]]:
    """A row of the table for every way."""
    random = torch.Generator().manual_seed(0)
    weights = [
        torch.randint(-127, 128, shape, generator=random, dtype=torch.int8) for _ in range(BLOCKS) for shape in SHAPES
    ]
    inputs = {columns: torch.randint(-127, 128, (rows, columns), generator=random).float() for _, columns in SHAPES}
    made = {name: [way(weight) for weight in weights] for name, way in WAYS.items()}

    def every(products: list[Multiply]) -> None:
        for weight, product in zip(weights, products, strict=True):
            product(inputs[weight.shape[1]])

    seconds = seconds_per_round({name: partial(every, made[name]) for name in WAYS}, rounds, seconds_per_turn)
    found = []
    for name, products in made.items():
        exact = all(
            torch.equal(product(x).double(), x.double() @ weight.double().t())
            for weight, product in zip(weights[: len(SHAPES)], products, strict=False)
            for x in [inputs[weight.shape[1]]]
        )
        spread = Spread.of([1e3 * each for each in seconds[name]])
        against = ratios(seconds[REFERENCE], seconds[name]).text()
        found.append([str(rows), name, spread.text(1), against, "yes" if exact else "no"])
    return found


def main() -> None:
    """Read the command line, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 512])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--seconds-per-turn", type=float, default=0.3)
    parser.add_argument("--out", type=Path, help="a Markdown document whose section is replaced")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    lines: list[list[str]] = []
    for rows in options.rows:
        lines += measure(rows, options.rounds, options.seconds_per_turn)
    facts: dict[str, Any] = machine(options.threads)
    stated = ", ".join(f"{key} {value}" for key, value in facts.items())
    header = ["rows", "way", "ms for all blocks", f"speed / {REFERENCE}", "exact"]
    text = f"""
## Products with int8 weights

{stated}. SmolLM2-135M's shapes, 30 blocks. Median (smallest to largest) of {options.rounds} interleaved rounds; ratios
are made within each round.

{table(header, lines)}
"""
    print(text)
    if options.out:
        write_section(options.out, "int8-products", text)


if __name__ == "__main__":
    main()
