"""The files of one image expert: an ONNX file, and what its certificate says of every layer."""

from __future__ import annotations

from pathlib import Path

import torch

from moqe.formats.onnx_biases import integer_biases
from moqe.formats.onnx_writer import write_onnx_expert
from moqe.methods.certificate import LayerRecord, significant
from moqe.methods.vision import VisionResult
from moqe.models.convolutions import LayerSite
from moqe.recipe import Expert
from moqe.schemes import Scheme
from moqe.tasks.image_models import FoldedClassifier

FULL_PRECISION = 32.0


def expert_file(folder: Path) -> Path:
    """The file of an image expert in its folder."""
    return folder / "model.onnx"


def expert_file_bytes(folded: FoldedClassifier, scheme: Scheme) -> int:
    """About how many bytes an expert's file takes: weights at their width, everything else in float32."""
    return int(folded.weights * scheme.weight_bits / 8 + 4 * (folded.parameters - folded.weights)) + 2**17


def write_expert(path: Path, folded: FoldedClassifier, result: VisionResult, expert: Expert) -> None:
    """Write what a method made of a network as the file of `expert`."""
    write_onnx_expert(
        path,
        folded.network,
        integer_biases(result.layers),
        tuple(folded.example.shape[1:]),
        {"moqe.expert": expert.name, "moqe.method": expert.method, "moqe.scheme": expert.scheme},
    )


def records(
    expert: Expert, scheme: Scheme, sites: tuple[LayerSite, ...], result: VisionResult, images: int
) -> list[LayerRecord]:
    """What the certificate says of every layer that could be quantized, in the order they run."""
    made = {layer.name: layer for layer in result.layers}
    found = []
    for site in sites:
        layer, notes = made.get(site.name), dict(result.notes.get(site.name, {}))
        parameters = int(torch.Size(site.weight_shape).numel())
        bits = FULL_PRECISION
        if layer is not None:
            bits = layer.weight.bits + 32 * layer.weight.scale.numel() / parameters
        error, baseline = notes.pop("error", None), notes.pop("ptq_error", None)
        found.append(
            LayerRecord(
                name=f"{site.name}.weight",
                method_asked=expert.method,
                method_used=expert.method if layer is not None else "keep",
                scheme_asked=expert.scheme,
                scheme_used=scheme_of(layer.weight.bits, scheme) if layer is not None else "float32",
                group_size=0 if layer is None else layer.weight.block,
                parameters=parameters,
                bits_per_weight=round(bits, 4),
                seen=float(images),
                error=None if error is None else significant(error),
                baseline_error=None if baseline is None else significant(baseline),
                equals_baseline=error is not None and error == baseline,
                notes={name: significant(value) for name, value in notes.items()},
            )
        )
    return found


def scheme_of(weight_bits: int, asked: Scheme) -> str:
    """The scheme that a layer of so many weight bits really has; first and last layers often have 8."""
    if weight_bits == asked.weight_bits:
        return asked.name
    return f"w{weight_bits}a{max(weight_bits, asked.activation_bits)}"
