"""What a build will take, before it takes it: memory, disk and time of a recipe's experts, from a config alone.

Memory is the larger of two peaks. Calibrating: one float32 block and the copy a method works on, the hidden states of
all windows, the second moments per group and domain, and the largest factorisation. Scoring: float32 weights.
Disk is the experts' files, what they share stored once per file family, and what a build needs in between.
Time is counted operations divided by a measured matmul rate, plus each method's search, timed on a small matrix and
scaled by the number of weights. Both measurements take a few seconds; expect the right order, within a factor of two.
Training of routers is not included; distillation is counted apart, see `moqe.methods.distill.cost`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch

from moqe.methods.method import Method
from moqe.methods.statistics import accumulate
from moqe.models.calibration import BATCH_SIZE
from moqe.models.decoder import Decoder
from moqe.models.discovery import find_groups
from moqe.recipe import Expert
from moqe.schemes import Scheme

FLOAT32 = 4
PROCESS_BYTES = 600 * 2**20  # Python, torch and transformers before any model
SAMPLE_ROWS, SAMPLE_COLUMNS = 64, 512  # whole super-blocks and groups of every size
_RATE_SECONDS = 0.3
_EFFICIENCY = 0.6  # share of a large matmul's rate that a block's forward reaches


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder that decide what it costs. A block's linears are (out, in) by name.

    groups: the width of the input of each group of linears, with the group's linears. block_parameters,
    other_parameters: numbers of weights in one block and outside the blocks. stored_bytes: per weight in the base.
    """

    blocks: int
    hidden: int
    vocabulary: int
    linears: Mapping[str, tuple[int, int]]
    groups: tuple[tuple[int, tuple[str, ...]], ...]
    block_parameters: int
    other_parameters: int
    stored_bytes: int

    @property
    def parameters(self) -> int:
        """All weights of the model, a tied head not counted twice."""
        return self.blocks * self.block_parameters + self.other_parameters

    @property
    def linear_weights(self) -> int:
        """Weights in all linears of all blocks: what is quantized."""
        return self.blocks * sum(out * columns for out, columns in self.linears.values())


@dataclass(frozen=True)
class Workload:
    """How much text goes through the model: windows of `window` tokens, for calibration in `domains` domains."""

    window: int
    calibration_windows: int
    domains: int
    scored_windows: int


@dataclass(frozen=True)
class Estimate:
    """Predicted cost of making and scoring the experts.

    ram_bytes: peak of the process. disk_bytes: of the finished experts. work_bytes: more disk, while building.
    expert_bytes: each expert as if it stood alone. seconds: by step, `calibrate`, `quantize`, `distill` where there is
    any, `score`.
    """

    parameters: int
    ram_bytes: int
    disk_bytes: int
    work_bytes: int
    expert_bytes: Mapping[str, int]
    seconds: Mapping[str, float]

    @property
    def total_seconds(self) -> float:
        """All steps together."""
        return sum(self.seconds.values())


def estimate(
    shape: Shape,
    experts: Sequence[Expert],
    schemes: Mapping[str, Scheme],
    methods: Mapping[str, Method],
    workload: Workload,
    flops_per_second: float,
    calibration_flops_per_second: float | None = None,
) -> Estimate:
    """Predict what making `experts` takes. schemes: by expert name. methods: by method name.

    Experts that are existing checkpoints (without a method) are scored but cost neither disk nor quantization: they
    are linked. Those with another's codes take the disk of their scales. flops_per_second: see `measure_flops`;
    calibration_flops_per_second: where statistics are taken in another precision.
    """
    made = [expert for expert in experts if expert.method]
    block_bytes = {expert.name: expert_block_bytes(shape, schemes[expert.name]) for expert in made}
    outside = shape.other_parameters * shape.stored_bytes
    coded = [expert for expert in made if not expert.codes_of]
    own = sum(block_bytes[expert.name] for expert in coded)
    own += sum(scale_block_bytes(shape, schemes[expert.name]) for expert in made if expert.codes_of)
    families = {schemes[expert.name].is_block for expert in made}
    sequential = sum(expert.sequential for expert in made)
    passes = 2 * sequential + (sequential < len(made))  # a sequential expert runs every block twice, alone
    return Estimate(
        parameters=shape.parameters,
        ram_bytes=PROCESS_BYTES + max(calibration_bytes(shape, workload), scoring_bytes(shape)),
        disk_bytes=own + outside * len(families),
        # GGUF blocks wait in parts until the file is assembled; sequential experts keep their replaced blocks.
        work_bytes=max((block_bytes[e.name] for e in made if schemes[e.name].is_block), default=0)
        + sequential * shape.blocks * shape.block_parameters * FLOAT32
        # Codes wait as the method left them; linked files count once, so what a distilled expert adds is its scales.
        + sum(scale_block_bytes(shape, schemes[e.name]) for e in coded if e.distill is not None),
        expert_bytes={name: size + outside for name, size in block_bytes.items()},
        seconds={
            "calibrate": passes
            * calibration_flops(shape, workload)
            / ((calibration_flops_per_second or flops_per_second) * _EFFICIENCY),
            "quantize": sum(
                shape.linear_weights * seconds_per_weight(methods[expert.method], schemes[expert.name], expert)
                + factorisation_flops(shape, expert) / (flops_per_second * _EFFICIENCY)
                for expert in coded
            ),
            "score": (1 + len(experts)) * scoring_flops(shape, workload) / (flops_per_second * _EFFICIENCY),
        },
    )


def measure_shape(decoder: Decoder) -> Shape:
    """The sizes of a decoder, `Decoder.dry` suffices. Materialises one block for the moment.

    Raises ModelError for a decoder that cannot be walked.
    """
    inside, outside = decoder.block_parameters(0), decoder.other_parameters()
    vocabulary, hidden = outside[decoder.embedding_name]
    block = decoder.load_block(0)
    try:
        probe = torch.zeros(1, 4, hidden)
        groups = find_groups(block, probe, decoder.block_inputs(probe)[0], decoder.block_names[0])
    finally:
        decoder.release_block(0)
    linears: dict[str, tuple[int, int]] = {}
    for name in (name for group in groups for name in group.names):
        out, columns = inside[f"{decoder.block_names[0]}.{name}.weight"]
        linears[name] = (out, columns)
    return Shape(
        blocks=decoder.number_of_blocks,
        hidden=hidden,
        vocabulary=vocabulary,
        linears=linears,
        groups=tuple((linears[group.key][1], group.names) for group in groups),
        block_parameters=sum(prod(shape) for shape in inside.values()),
        other_parameters=sum(prod(shape) for shape in outside.values()),
        stored_bytes=decoder.stored_dtype.itemsize,
    )


def expert_block_bytes(shape: Shape, scheme: Scheme) -> int:
    """Bytes of all blocks of an expert: its linears in the scheme, the rest in 16 bits."""
    linears = sum(out * columns * scheme.bits_per_weight(columns) / 8 for out, columns in shape.linears.values())
    rest = shape.block_parameters - sum(out * columns for out, columns in shape.linears.values())
    return int(shape.blocks * (linears + 2 * rest))


def scale_block_bytes(shape: Shape, scheme: Scheme) -> int:
    """Bytes that an expert with another's codes adds: its linears' scales, and what is no linear in 16 bits."""
    scales = sum(
        out * columns / (scheme.group_size or columns) for out, columns in shape.linears.values() if not scheme.is_block
    )
    rest = shape.block_parameters - sum(out * columns for out, columns in shape.linears.values())
    return int(shape.blocks * (scheme.scale_bits // 8 * scales + 2 * rest))


def calibration_bytes(shape: Shape, workload: Workload) -> int:
    """Peak while calibrating and quantizing one block."""
    widest = max(columns for columns, _ in shape.groups)
    largest = max(out * columns for out, columns in shape.linears.values())
    hidden = workload.calibration_windows * workload.window * shape.hidden
    activations = BATCH_SIZE * workload.window * 4 * max(widest, max(out for out, _ in shape.linears.values()))
    moments = workload.domains * sum(columns**2 for columns, _ in shape.groups)
    # The mix of domains stacks and sums one group's moments; gptq holds them, their inverse and its two factors.
    working = (workload.domains + 4) * widest**2 + 4 * largest
    walking = 2 * shape.block_parameters + activations + moments + working
    return FLOAT32 * (hidden + max(walking, shape.vocabulary * shape.hidden))


def scoring_bytes(shape: Shape) -> int:
    """Peak while scoring: one set of blocks in float32, the base's or an expert's, and what surrounds them, twice."""
    return FLOAT32 * (shape.parameters + shape.other_parameters)


def forward_flops(shape: Shape, tokens: int, window: int) -> float:
    """Operations of the blocks: two per weight and token, and causal attention over half a window on average."""
    return 2.0 * tokens * (shape.linear_weights + shape.blocks * window * shape.hidden)


def calibration_flops(shape: Shape, workload: Workload) -> float:
    """One forward over the calibration windows and x x^T per group."""
    tokens = workload.calibration_windows * workload.window
    moments = 2.0 * tokens * shape.blocks * sum(columns**2 for columns, _ in shape.groups)
    return forward_flops(shape, tokens, workload.window) + moments


def scoring_flops(shape: Shape, workload: Workload) -> float:
    """One expert's forward over the scored windows, with logits at every token."""
    tokens = workload.scored_windows * workload.window
    return forward_flops(shape, tokens, workload.window) + 2.0 * tokens * shape.hidden * shape.vocabulary


def factorisation_flops(shape: Shape, expert: Expert) -> float:
    """Dense algebra that grows faster than the number of weights and so is not seen on a small matrix."""
    weights = [(columns, sum(shape.linears[name][0] for name in names)) for columns, names in shape.groups]
    if expert.method == "gptq":  # Cholesky, inverse, Cholesky: 2 in^3; compensation: out x in^2
        return shape.blocks * sum(2.0 * columns**3 + rows * columns**2 for columns, rows in weights)
    if expert.method == "awq":  # tr(dW H dW^T) at every point of the search
        return shape.blocks * sum(2.0 * expert.awq.grid_points * rows * columns**2 for columns, rows in weights)
    return 0.0


def seconds_per_weight(method: Method, scheme: Scheme, expert: Expert) -> float:
    """Time of a method's search per weight, on a small random matrix and with the threads torch has now."""
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(SAMPLE_ROWS, SAMPLE_COLUMNS, generator=random) * 0.02
    statistics = accumulate(None, torch.randn(2 * SAMPLE_COLUMNS, SAMPLE_COLUMNS, generator=random))
    start = time.perf_counter()
    method.smooth([weight], statistics, scheme, expert, lambda scale: scale, {})
    method.quantize(weight, statistics, scheme, expert, torch.bfloat16, {})
    return (time.perf_counter() - start) / weight.numel()


def measure_flops(device: str = "cpu", dtype: torch.dtype = torch.float32) -> float:
    """Operations per second of a large matmul, measured for a third of a second."""
    matrix = torch.randn(1024, 1024, device=device, dtype=dtype)
    float((matrix @ matrix)[0, 0])  # warm up, and wait: kernels of an accelerator run on their own
    products, start = 0, time.perf_counter()
    while time.perf_counter() - start < _RATE_SECONDS:
        float((matrix @ matrix)[0, 0])
        products += 1
    return products * 2.0 * 1024**3 / (time.perf_counter() - start)
