"""The `quantization_config` of a compressed-tensors folder: which linear is stored in which scheme.

Format: `config_groups` map targets (a linear's full name, `re:` and a regular expression, or a class name such as
`Linear`, matched in this order) to arguments of weights and input activations; `ignore` lists what stays in full
precision. Written: integer weights by channel or group, with or without dynamic per-token activations. Read: the same
plus one scale per tensor; anything else (fp8, static or asymmetric activations, sparsity, rotations, quantized caches)
is refused, because running it as something else would change the expert's losses.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moqe.errors import CheckpointError
from moqe.schemes import Scheme

PACKED = "pack-quantized"
INTEGER = "int-quantized"


def storage_format(scheme: Scheme) -> str:
    """How codes are stored: packed into words for weight-only schemes, one a byte where activations are integers too.

    vLLM and transformers choose their kernels by this name.
    """
    return PACKED if scheme.activation_bits == 16 else INTEGER


def write_config(scheme: Scheme, other_groups: Mapping[int, Sequence[str]], ignore: Sequence[str]) -> dict[str, Any]:
    """The `quantization_config` of an expert.

    other_groups: group size (0 for one scale per channel) to the linears that have it instead of the scheme's own.
    ignore: linears in full precision; the output head is always among them, because with tied embeddings loading
    fails without it. `quantization_status` must say compressed, or transformers leaves the weights random.
    """
    groups = {"group_0": _write_group(scheme, scheme.group_size, ["Linear"])}
    for number, (group_size, linears) in enumerate(sorted(other_groups.items()), start=1):
        groups[f"group_{number}"] = _write_group(scheme, group_size, sorted(linears))
    return {
        "quant_method": "compressed-tensors",
        "format": storage_format(scheme),
        "quantization_status": "compressed",
        "ignore": ["lm_head", *sorted(set(ignore) - {"lm_head"})],
        "kv_cache_scheme": None,
        "config_groups": groups,
    }


def _write_group(scheme: Scheme, group_size: int, targets: list[str]) -> dict[str, Any]:
    weights = {
        "num_bits": scheme.weight_bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "group" if group_size else "channel",
        "group_size": group_size or None,
        "dynamic": False,
    }
    activations = {
        "num_bits": scheme.activation_bits,
        "type": "int",
        "symmetric": True,
        "strategy": "token",
        "group_size": None,
        "dynamic": True,
    }
    return {
        "targets": targets,
        "weights": weights,
        "input_activations": activations if scheme.activation_bits < 16 else None,
        "output_activations": None,
        "format": storage_format(scheme),
    }


@dataclass(frozen=True)
class LinearFormats:
    """The schemes of a folder's linears. `groups`: targets and scheme, in the file's order; `ignore`: targets."""

    groups: tuple[tuple[tuple[str, ...], Scheme], ...]
    ignore: tuple[str, ...]

    def scheme_of(self, linear: str) -> Scheme | None:
        """The scheme of a linear by its full name, or None where it stays in full precision."""
        if any(_matches(target, linear) for target in self.ignore):
            return None
        targets = [(target, scheme) for group, scheme in self.groups for target in group]
        exact = [scheme for target, scheme in targets if target == linear]
        pattern = [scheme for target, scheme in targets if target.startswith("re:") and _matches(target, linear)]
        by_class = [scheme for target, scheme in targets if target == "Linear"]
        return next(iter(exact + pattern + by_class), None)


def _matches(target: str, linear: str) -> bool:
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), linear) is not None
    return target == linear


def read_config(config: Mapping[str, Any], where: str) -> LinearFormats:
    """Parse a `quantization_config`. Raises CheckpointError on whatever MoQE does not run exactly; `where` names it."""
    for key, what in (
        ("kv_cache_scheme", "a quantized key-value cache"),
        ("sparsity_config", "sparse weights"),
        ("transform_config", "rotated weights"),
    ):
        value = config.get(key)
        if value and not (key == "sparsity_config" and value.get("format", "dense") == "dense"):
            raise _unsupported(where, what)
    try:
        groups = tuple(
            (tuple(str(target) for target in group["targets"]), _read_group(group, f"{where}, {name}"))
            for name, group in config["config_groups"].items()
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{where}: malformed config_groups ({error!r}): download or build it again") from error
    return LinearFormats(groups, tuple(config.get("ignore") or ()))


def _read_group(group: Mapping[str, Any], where: str) -> Scheme:
    weights = group["weights"]
    if not weights or weights.get("type", "int") != "int" or weights.get("dynamic"):
        raise _unsupported(where, "weights that are not static integers (such as fp8)")
    group_size = weights.get("group_size")
    inferred = "tensor" if group_size is None else "group" if group_size > 0 else "channel"
    strategy = weights.get("strategy") or inferred
    if strategy not in ("tensor", "channel", "group"):
        raise _unsupported(where, f"weight strategy {strategy!r}")
    if group.get("output_activations"):
        raise _unsupported(where, "quantized outputs")
    bits = int(weights.get("num_bits", 8))
    if not 2 <= bits <= 8:
        raise _unsupported(where, f"{bits}-bit weights")
    activation_bits = _read_activations(group.get("input_activations"), where)
    return Scheme(
        f"w{bits}a{activation_bits}",
        bits,
        activation_bits,
        symmetric=bool(weights.get("symmetric", True)),
        group_size=int(group_size) if strategy == "group" else 0,
    )


def _read_activations(activations: Mapping[str, Any] | None, where: str) -> int:
    if not activations:
        return 16
    if activations.get("type", "int") != "int" or not activations.get("symmetric", True):
        raise _unsupported(where, "activations that are not symmetric integers")
    if activations.get("dynamic") is not True or activations.get("strategy") != "token":
        raise _unsupported(where, "activation scales that are not dynamic per token")
    return int(activations.get("num_bits", 8))


def _unsupported(where: str, what: str) -> CheckpointError:
    return CheckpointError(f"{where}: {what} are not supported: use a checkpoint with integer weights (w4a16, w8a8)")
