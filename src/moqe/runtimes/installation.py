"""Giving a copy of the full-precision model an expert's parameters, as floats or as the codes they are stored in."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from moqe.errors import CheckpointError, NumericalError
from moqe.formats.expert_files import ExpertFiles, PackedFiles
from moqe.formats.packed_tensor import PackedTensor
from moqe.formats.safetensors_folder import in_block
from moqe.formats.shared_codes import Lease
from moqe.models.activations import quantize_inputs
from moqe.progress import Advance, ignore
from moqe.quantized import Quantized
from moqe.runtimes.coded_linear import CodedLinear


def install(
    model: nn.Module, expert: ExpertFiles, expert_name: str, advance: Advance = ignore, lease: Lease | None = None
) -> None:
    """Give a shared copy the expert's parameters and the quantization of its activations.

    The skeleton's blocks may lie on the meta device: the expert fills them. Parameters equal to the model's stay shared
    with it. `advance` is told of each of the expert's parameters. With `lease`, quantized linears of the blocks become
    `CodedLinear`s, their codes and scales held by it. Raises CheckpointError when the expert has parameters the model
    lacks, other shapes, too few to cover the decoder's blocks, or, with `lease`, a format whose codes cannot be kept;
    NumericalError when a weight is not finite.
    """
    device = next(tensor.device for tensor in model.parameters() if not tensor.is_meta)
    modules = dict(model.named_modules())
    parameters = dict(model.named_parameters(remove_duplicate=False))
    names = stored_names(parameters, expert, expert_name)
    advance(len(expert.names()) - len(names))  # those that change nothing
    replaced: dict[int, nn.Parameter] = {}
    coded: dict[str, PackedTensor] = {}
    for name in names:
        advance(1)
        old = parameters[name]
        value = _stored(expert, name, modules[name.rpartition(".")[0]], lease)
        weight = value.dequantize() if isinstance(value, Quantized) else value
        if tuple(weight.shape) != tuple(old.shape):
            shapes = f"{name} is {tuple(weight.shape)} and should be {tuple(old.shape)}"
            raise CheckpointError(f"expert {expert_name} does not belong to this base model: {shapes}")
        if isinstance(value, Tensor) and not old.is_meta and _equal(old, value):
            continue
        if isinstance(weight, Tensor):
            weight = weight.to(device, old.dtype)
        if not _is_finite(weight):
            raise NumericalError(f"expert {expert_name}: {name} is not finite; build it again or remove it")
        if isinstance(weight, PackedTensor):
            coded[name] = weight
            continue
        replaced[id(old)] = nn.Parameter(weight, requires_grad=False)
        _assign(modules, name, replaced[id(old)])
    # A tied tensor has several names and the expert gives it one: the others follow.
    for name in set(parameters) - set(names):
        if id(parameters[name]) in replaced:
            _assign(modules, name, replaced[id(parameters[name])])
    for name, packed in coded.items():  # last, because they take over the biases that were installed
        path = name.removesuffix(".weight")
        modules[path] = CodedLinear(packed, modules[path].bias)
        model.set_submodule(path, modules[path])
    for name in names:
        bits = expert.activation_bits(name)
        if bits < 16:
            quantize_inputs(modules[name.rpartition(".")[0]], bits)


def stored_names(parameters: Collection[str], expert: ExpertFiles, expert_name: str) -> list[str]:
    """The model's parameters, by name, that an expert brings; what changes nothing is left out.

    Raises CheckpointError when it has parameters that the model lacks, or too few to cover the decoder's blocks.
    """
    names = expert.names()
    lacking = sorted(name for name in set(parameters) - set(names) if in_block(name))
    unknown = sorted(name for name in set(names) - set(parameters) if not _is_redundant(name, expert))
    if lacking or unknown:
        example = f"it lacks {lacking[0]}" if lacking else f"the base model has no {unknown[0]}"
        raise CheckpointError(f"expert {expert_name} does not belong to this base model: {example}")
    return [name for name in names if name in parameters]


def _stored(
    expert: ExpertFiles, name: str, module: nn.Module, lease: Lease | None
) -> PackedTensor | Quantized | Tensor:
    """A parameter as it is loaded, packed where it is to stay so."""
    if lease is None or not in_block(name) or not isinstance(module, nn.Linear):
        return expert.load(name)
    if not isinstance(expert, PackedFiles):
        raise CheckpointError(f"a {expert.format} expert's codes cannot be shared: run it without `codes`")
    return expert.packed(name, lease)


def _is_finite(weight: PackedTensor | Tensor) -> bool:
    if isinstance(weight, Tensor):
        return bool(torch.isfinite(weight).all())
    # The largest weight there can be; looking at the codes would read the whole file.
    return bool(torch.isfinite(weight.scale.to(torch.float32) * (1 << weight.scheme.weight_bits)).all())


def _is_redundant(name: str, expert: ExpertFiles) -> bool:
    """Whether a parameter the model lacks changes nothing: older tools store rotary tables and biases of zeros."""
    if name.endswith(".rotary_emb.inv_freq"):
        return True
    if not name.endswith(".bias"):
        return False
    bias = expert.load(name)
    return isinstance(bias, Tensor) and not bias.any()


def _assign(modules: dict[str, nn.Module], name: str, parameter: nn.Parameter) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(modules[owner], leaf, parameter)


def _equal(parameter: Tensor, stored: Tensor) -> bool:
    """Whether a stored tensor has the parameter's values, compared in slices so that no large copy is made."""
    pairs = zip(torch.split(parameter.detach(), 4096), torch.split(stored, 4096), strict=True)
    return all(torch.equal(ours, theirs.to(ours.device, ours.dtype)) for ours, theirs in pairs)
