"""The certificate of an expert: per layer what was asked, what was done, and how far the result is from the original.

The error of a layer is tr(dW H dW^T) / tr(W H W^T): the squared output error over all calibration tokens, relative to
the output's own square, with dW taken in the base model's coordinates (scales that smoothing folded are undone). It is
comparable between methods, says what the closed forms minimise, and is no judge: held-out loss is. Certificates hold
no times and no paths, so equal builds have equal certificates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from moqe.errors import CheckpointError, UnsupportedLayer
from moqe.recipe import Expert

ERROR_DIGITS = 6  # significant; more would only show the order of summation


@dataclass(frozen=True)
class LayerRecord:
    """What happened to one linear.

    name: full name of the weight. method and scheme as asked and as used; `method_used` is `keep` for a layer left in
    full precision. group_size: of what was used, 0 per output channel. seen: calibration tokens, weighted, or images.
    error, baseline_error: relative, of the result and of the scheme's plain method (rtn, kquants for block schemes, ptq
    for images); None where nothing was seen. equals_baseline: the result is that method's, number for number.
    substituted: empty, or why something else was done than asked. notes: what the method noted.
    """

    name: str
    method_asked: str
    method_used: str
    scheme_asked: str
    scheme_used: str
    group_size: int
    parameters: int
    bits_per_weight: float
    seen: float
    error: float | None
    baseline_error: float | None
    equals_baseline: bool
    substituted: str = ""
    notes: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The record as JSON values."""
        return asdict(self)

    @staticmethod
    def from_json(content: Mapping[str, Any]) -> LayerRecord:
        """Read back what `to_json` gave. Raises CheckpointError when keys are missing or unknown."""
        try:
            return LayerRecord(**content)
        except TypeError as error:
            raise CheckpointError(f"a layer record of the certificate is malformed ({error}): build again") from None


@dataclass(frozen=True)
class Certificate:
    """All layers of one expert, and the totals over its quantized linears.

    Errors are the method's, before any distillation.
    parameters: weights of all linears in the decoder's blocks. bits_per_weight: their mean as stored.
    substituted_share: the share of parameters in layers where something else was done than asked.
    error, baseline_error: mean over layers that have one; None when none has. codes_of: whose integer codes it has;
    empty for its own. distilled: how its scales were trained, None where they were not. specialised: how often a member
    of a family of image experts saw its own images, and what rounds brought; None for all others.
    """

    expert: str
    method: str
    scheme: str
    parameters: int
    bits_per_weight: float
    substituted_share: float
    error: float | None
    baseline_error: float | None
    layers: tuple[LayerRecord, ...]
    codes_of: str = ""
    distilled: Mapping[str, Any] | None = None
    specialised: Mapping[str, Any] | None = None

    @property
    def substitutions(self) -> tuple[LayerRecord, ...]:
        """The layers where something else was done than asked."""
        return tuple(layer for layer in self.layers if layer.substituted)

    def to_json(self) -> dict[str, Any]:
        """The certificate as JSON values, for `certificate.json`."""
        content = asdict(self)
        if self.specialised is None:
            del content["specialised"]  # a key that only families of image experts have
        return content

    @staticmethod
    def from_json(content: Mapping[str, Any]) -> Certificate:
        """Read back what `to_json` gave. Raises CheckpointError when keys are missing or unknown."""
        try:
            layers = tuple(LayerRecord.from_json(layer) for layer in content["layers"])
            return Certificate(**{**content, "layers": layers})
        except (TypeError, KeyError) as error:
            raise CheckpointError(f"certificate.json is malformed ({error}): build the expert again") from None


def certify(expert: Expert, layers: Sequence[LayerRecord], calibrated: bool) -> Certificate:
    """Sum up the records of all layers, and refuse a calibrated method's result that is plain rounding in disguise.

    calibrated: whether the method is anything else than plain rounding.

    Raises UnsupportedLayer when there are no layers at all, or see `check_not_baseline`.
    """
    if not layers:
        raise UnsupportedLayer(f"expert {expert.name!r}: the model has no linear layer to quantize")
    if calibrated:
        check_not_baseline(expert, layers)
    parameters = sum(layer.parameters for layer in layers)
    return Certificate(
        expert.name,
        expert.method,
        expert.scheme,
        parameters,
        round(sum(layer.bits_per_weight * layer.parameters for layer in layers) / parameters, 4),
        round(sum(layer.parameters for layer in layers if layer.substituted) / parameters, 6),
        _mean([layer.error for layer in layers]),
        _mean([layer.baseline_error for layer in layers]),
        tuple(layers),
    )


def check_not_baseline(expert: Expert, layers: Sequence[LayerRecord]) -> None:
    """Raise UnsupportedLayer when a calibrated method's result equals the plain one's in every layer."""
    if all(layer.equals_baseline for layer in layers):
        raise UnsupportedLayer(
            f"expert {expert.name!r}: {expert.method} gave plain rounding in all {len(layers)} layers, so calibration "
            "had no effect: check the calibration data, or write the method that was really used"
        )


def significant(value: float) -> float:
    """A number rounded to the digits a certificate keeps."""
    return float(f"{value:.{ERROR_DIGITS}g}")


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return significant(sum(known) / len(known)) if known else None
