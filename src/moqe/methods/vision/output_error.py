"""How far the outputs of quantized layers are from the full-precision network's, with everything before them quantized.

The error of a layer is the sum of (y_hat - y)^2 over calibration images, relative to the sum of y^2. It says where a
network loses precision and is no judge: held-out loss is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moqe.methods.vision.layer import QuantizedLayer
from moqe.methods.vision.method import CalibrationImages, Job
from moqe.methods.vision.network import quantize_network

IMAGES = 256  # that errors are measured on, at most
BATCH = 64


@torch.no_grad()
def output_errors(network: nn.Module, layers: Sequence[QuantizedLayer], images: CalibrationImages) -> dict[str, float]:
    """Relative squared output error by layer name, over the first 256 images at most."""
    names = [layer.name for layer in layers]
    quantized = quantize_network(network, layers)
    truth, result = dict[str, Tensor](), dict[str, Tensor]()
    handles = [_keep(dict(network.named_modules())[name], truth, name) for name in names]
    handles += [_keep(dict(quantized.named_modules())[name], result, name) for name in names]
    error, square = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    try:
        for rows in torch.split(torch.arange(min(len(images), IMAGES)), BATCH):
            batch = images.batch(rows)
            network(batch)
            quantized(batch)
            for name in names:
                error[name] += float((result[name] - truth[name]).square().sum())
                square[name] += float(truth[name].square().sum())
    finally:
        for handle in handles:
            handle.remove()
    return {name: error[name] / square[name] if square[name] else 0.0 for name in names}


def error_notes(
    job: Job, layers: Sequence[QuantizedLayer], baseline: Sequence[QuantizedLayer], **others: float
) -> dict[str, dict[str, float]]:
    """`error` and `ptq_error` of each of `layers`; baseline: what ptq made of the same network.

    others: what is noted of every layer alike.
    """
    own = output_errors(job.network, layers, job.images)
    plain = own if layers is baseline else output_errors(job.network, baseline, job.images)
    return {name: significant({"error": own[name], "ptq_error": plain[name], **others}) for name in own}


def significant(note: Mapping[str, float]) -> dict[str, float]:
    """A note with six digits of each number: more would differ from one processor to the next."""
    return {key: float(f"{value:.6g}") for key, value in note.items()}


def _keep(module: nn.Module, where: dict[str, Tensor], name: str) -> Any:
    def hook(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        where[name] = output

    keep: Callable[..., None] = hook
    return module.register_forward_hook(keep)
