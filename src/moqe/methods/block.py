"""Quantize one decoder block for one expert: smooth what can be folded, round every linear, record what was done.

The block given is left as it is, so that one calibration pass serves all experts. Linears that share an input are
rounded as one matrix, because methods treat rows alone and the costly part (GPTQ's factor of H) is the same for all.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from moqe.errors import NumericalError, UnsupportedLayer
from moqe.methods import METHODS, method_named
from moqe.methods.certificate import LayerRecord, significant
from moqe.methods.grids import group_width
from moqe.methods.method import Method, Notes
from moqe.methods.output_error import output_error, unfold
from moqe.methods.statistics import InputStatistics, combine
from moqe.models.groups import LinearGroup, fold, reduce_scale
from moqe.quantized import BlockTensor, IntegerTensor, Quantized
from moqe.recipe import Expert
from moqe.schemes import Scheme, scheme

logger = logging.getLogger("moqe")


@dataclass(frozen=True)
class BlockResult:
    """All parameters of one decoder block as an expert stores them, by full name, and a record per linear."""

    tensors: dict[str, Quantized | Tensor]
    layers: list[LayerRecord]


@dataclass
class _Job:
    """A group on its way through the block: what was decided so far."""

    group: LinearGroup
    statistics: InputStatistics | None  # of the base model's inputs
    scheme: Scheme
    method: Method | None  # None leaves the group in full precision
    substituted: str
    notes: Notes
    scale: Tensor | None = None  # folded into the group's columns, (in,)


def quantize_block(
    block: nn.Module,
    groups: Sequence[LinearGroup],
    statistics: Mapping[str, Mapping[str, InputStatistics]],
    expert: Expert,
    wanted: Scheme,
    prefix: str,
    scale_dtype: torch.dtype,
    parameter_dtype: torch.dtype,
) -> BlockResult:
    """Quantize all linears of a decoder block.

    groups: in forward order. statistics: by group key, then by calibration domain. wanted: from `methods.check`.
    prefix: the block's full name, `model.layers.3`. scale_dtype: of integer schemes' scales. parameter_dtype: of norms,
    biases and layers left in full precision.
    Raises UnsupportedLayer or NumericalError with the layer's name, where the expert's `on_unsupported` is `error`.
    """
    grouped = {name for group in groups for name in group.names}
    lonely = [name for name, module in block.named_modules() if isinstance(module, nn.Linear) and name not in grouped]
    jobs = [
        _plan(block, group, statistics.get(group.key, {}), expert, wanted, prefix)
        for group in [*groups, *(LinearGroup((name,)) for name in lonely)]
    ]
    folded = copy.deepcopy(block)
    for job in jobs:
        _smooth(folded, job, expert, prefix, parameter_dtype)
    quantized: dict[str, Quantized] = {}
    records: dict[str, LayerRecord] = {}
    for job in jobs:
        results = _round(folded, job, expert, prefix, scale_dtype)
        for name, result in zip(job.group.names, results, strict=True):
            if result is not None:
                quantized[f"{name}.weight"] = result
            original, stored = _weight(block, name), _weight(folded, name)
            records[name] = _record(
                job, f"{prefix}.{name}.weight", original, stored, result, expert, scale_dtype, parameter_dtype
            )
    tensors: dict[str, Quantized | Tensor] = {}
    for name, parameter in folded.named_parameters():
        tensors[f"{prefix}.{name}"] = quantized.get(name, parameter.detach().to(parameter_dtype))
    return BlockResult(tensors, [records[name] for job in jobs for name in job.group.names])


def split_rows(tensor: Quantized, sizes: Sequence[int]) -> list[Quantized]:
    """Cut a quantized matrix into matrices of `sizes` rows; each owns its memory."""

    def cut(part: Tensor) -> list[Tensor]:
        return [piece.clone() for piece in torch.split(part, list(sizes))]

    if isinstance(tensor, IntegerTensor):
        zeros = [None] * len(sizes) if tensor.zero_point is None else cut(tensor.zero_point)
        return [
            IntegerTensor(codes, scale, zero, tensor.scheme)
            for codes, scale, zero in zip(cut(tensor.codes), cut(tensor.scale), zeros, strict=True)
        ]
    fields = {name: cut(part) for name, part in tensor.fields.items()}
    return [
        BlockTensor(codes, {name: parts[i] for name, parts in fields.items()}, scheme=tensor.scheme)
        for i, codes in enumerate(cut(tensor.codes))
    ]


def _plan(
    block: nn.Module,
    group: LinearGroup,
    by_domain: Mapping[str, InputStatistics],
    expert: Expert,
    wanted: Scheme,
    prefix: str,
) -> _Job:
    """Decide scheme and method of a group before anything is computed."""
    method = method_named(expert.method)
    weight = _weight(block, group.key)
    columns = weight.shape[1]
    statistics, missing = None, "no calibration token reaches it: add calibration data that does"
    if any(part.tokens for part in by_domain.values()):
        try:
            statistics, missing = combine(by_domain, expert.calibration), ""
        except NumericalError as error:
            missing = str(error)
    job = _Job(group, statistics, wanted, method, "", {})
    if wanted.is_block and columns % wanted.block_size and expert.block_fallback:
        job.scheme = scheme(expert.block_fallback)
        job.substituted = (
            f"rows of {columns} do not divide into {wanted.name}'s blocks of {wanted.block_size}: "
            f"{expert.block_fallback}, as block_fallback says"
        )
    problem = _misfit(columns, job.scheme)
    if not problem and method.calibrated:
        problem = missing
    if not problem and not weight.is_floating_point():
        problem = f"its weights are {weight.dtype}: use a base model in floating point"
    if problem:
        _substitute(job, expert, prefix, problem, columns, UnsupportedLayer)
    return job


def _misfit(columns: int, chosen: Scheme) -> str:
    """Why rows of `columns` do not fit a scheme, and the fix; empty when they do."""
    if chosen.is_block:
        if columns % chosen.block_size:
            return (
                f"rows of {columns} do not divide into {chosen.name}'s blocks of {chosen.block_size}: "
                "set block_fallback to a scheme of smaller blocks, for example q4_0"
            )
        return ""
    try:
        group_width(columns, chosen)
    except UnsupportedLayer as error:
        return str(error)
    return ""


def _substitute(
    job: _Job,
    expert: Expert,
    prefix: str,
    problem: str,
    columns: int,
    raised: type[UnsupportedLayer] | type[NumericalError],
) -> None:
    """Do what `on_unsupported` says about a group with a problem: raise, round plainly, or keep it as it is."""
    where = f"expert {expert.name!r}, layer {prefix}.{job.group.key}"
    if expert.on_unsupported == "error":
        raise raised(f"{where}: {problem}, or set on_unsupported to rtn or keep")
    job.substituted = problem
    if expert.on_unsupported == "keep":
        job.method = None
    else:
        job.method = METHODS["kquants" if job.scheme.is_block else "rtn"]
        if not job.scheme.is_block and _misfit(columns, job.scheme):
            sizes = [size for size in (128, 64, 32) if size < job.scheme.group_size and columns % size == 0]
            job.scheme = replace(job.scheme, group_size=sizes[0] if sizes else 0)
        elif _misfit(columns, job.scheme):
            raise UnsupportedLayer(f"{where}: {problem}; on_unsupported: rtn cannot help, rows stay too short")
    logger.warning("%s: %s: %s instead", where, problem, job.method.name if job.method else "full precision")


def _smooth(folded: nn.Module, job: _Job, expert: Expert, prefix: str, parameter_dtype: torch.dtype) -> None:
    """Let the method move a scale between the group and its source, in place."""
    if job.group.source is None or job.method is None or job.statistics is None or job.substituted:
        return
    weights = [_weight(folded, name) for name in job.group.names]
    try:
        scale = job.method.smooth(
            weights, job.statistics, job.scheme, expert, lambda wished: reduce_scale(job.group, wished), job.notes
        )
    except NumericalError as error:
        _substitute(job, expert, prefix, str(error), weights[0].shape[1], NumericalError)
        return
    if scale is None:
        return
    if job.group.kind == "norm":
        scale = _storable(folded.get_submodule(job.group.source), scale, parameter_dtype)
    fold(folded, job.group, scale)
    job.scale = scale


def _storable(norm: nn.Module, scale: Tensor, parameter_dtype: torch.dtype) -> Tensor:
    """The scale next to `scale` that leaves a norm's weight, divided by it, exact in the type of the file.

    Otherwise rounding the folded norm would be an error of its own, up to 0.4 % of each channel in bfloat16.
    """
    weight = norm.get_parameter("weight").detach().float()  # (in,)
    rounded = (weight / scale).to(parameter_dtype).float()
    exact = weight / rounded
    return torch.where(torch.isfinite(exact) & (exact > 0), exact, scale)


def _round(
    folded: nn.Module, job: _Job, expert: Expert, prefix: str, scale_dtype: torch.dtype
) -> Sequence[Quantized | None]:
    """Quantize the group's linears as one matrix; None for each where it stays in full precision."""
    weights = [_weight(folded, name).float() for name in job.group.names]
    statistics = job.statistics
    if statistics is not None and job.scale is not None:
        statistics = statistics.scaled_inputs(job.scale)
    stacked = torch.cat(weights)
    result: Quantized | None = None
    while job.method is not None and result is None:
        failing = job.method
        try:
            result = failing.quantize(stacked, statistics, job.scheme, expert, scale_dtype, job.notes)
        except (NumericalError, UnsupportedLayer) as error:
            _substitute(job, expert, prefix, str(error), stacked.shape[1], type(error))
            if job.method is failing:  # plain rounding fails as well
                raise type(error)(f"expert {expert.name!r}, layer {prefix}.{job.group.key}: {error}") from error
    if result is None:
        return [None] * len(weights)
    return split_rows(result, [len(weight) for weight in weights])


def _record(
    job: _Job,
    name: str,
    original: Tensor,
    stored: Tensor,
    result: Quantized | None,
    expert: Expert,
    scale_dtype: torch.dtype,
    parameter_dtype: torch.dtype,
) -> LayerRecord:
    """Measure one linear's result in the base model's coordinates."""
    columns = original.shape[1]
    bits = job.scheme.bits_per_weight(columns) if result is not None else float(torch.finfo(parameter_dtype).bits)
    error, baseline_error, equals_baseline = None, None, False
    if result is not None:
        plain_method = METHODS["kquants" if job.scheme.is_block else "rtn"]
        effective = unfold(result.dequantize(), original, stored, job.scale)
        if job.method is plain_method and job.scale is None:
            plain = effective
        else:
            made = plain_method.quantize(original.float(), None, job.scheme, expert, scale_dtype, {})
            plain = made.dequantize()
        equals_baseline = torch.equal(effective, plain)
        if job.statistics is not None:
            hessian = job.statistics.hessian
            energy = max(output_error(original.float(), hessian), torch.finfo(torch.float32).tiny)
            error = significant(output_error(effective - original, hessian) / energy)
            baseline_error = error if equals_baseline else significant(output_error(plain - original, hessian) / energy)
    return LayerRecord(
        name=name,
        method_asked=expert.method,
        method_used=job.method.name if job.method is not None else "keep",
        scheme_asked=expert.scheme,
        scheme_used=job.scheme.name if job.method is not None else "",
        group_size=job.scheme.block_size or job.scheme.group_size,
        parameters=original.numel(),
        bits_per_weight=bits,
        seen=job.statistics.tokens if job.statistics is not None else 0.0,
        error=error,
        baseline_error=baseline_error,
        equals_baseline=equals_baseline,
        substituted=job.substituted,
        notes={key: significant(value) for key, value in sorted(job.notes.items())},
    )


def _weight(block: nn.Module, name: str) -> Tensor:
    """A linear's weight without gradient, (out, in)."""
    return block.get_submodule(name).get_parameter("weight").detach()
