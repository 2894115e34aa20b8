"""What all experts of an image mixture share, in the mixture's own folder: no base model is needed to run one.

`shared/images.json`  names of the classes, and how an image becomes the input of the base model and of every expert
`shared/stem.onnx`    the base model's first stage, pooled, in float32: what a router of `feature: stem` sees
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from moqe.data.preprocessing import Preprocessing
from moqe.errors import CheckpointError
from moqe.formats.onnx_stem import write_onnx_stem
from moqe.models.image_features import first_stage, stem_pooling, stem_thinning
from moqe.store import read_json, write_json

DESCRIPTION, STEM = "images.json", "stem.onnx"


@dataclass(frozen=True)
class ImageShared:
    """classes: names, in the order of the logits. preprocessing: of `base` and of every expert."""

    classes: tuple[str, ...]
    preprocessing: Mapping[str, Preprocessing]


def write_image_shared(
    folder: Path, shared: ImageShared, network: nn.Module, first: str, shape: tuple[int, ...]
) -> None:
    """Write what experts share. network: the folded base model. first: its first convolution. shape: (3, h, w)."""
    stage = first_stage(network, first, torch.zeros(1, *shape, device=next(network.parameters()).device))
    size = stage.shape[1:]
    write_onnx_stem(folder / STEM, network, first, shape, stem_thinning(*size), *stem_pooling(*size))
    write_json(folder / DESCRIPTION, asdict(shared))


def read_image_shared(folder: Path) -> ImageShared:
    """Read it back. Raises CheckpointError when it is missing or damaged."""
    try:
        return TypeAdapter(ImageShared).validate_python(read_json(folder / DESCRIPTION))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(
            f"{folder / DESCRIPTION} is damaged ({where}: {first['msg']}): build or copy the mixture again"
        ) from error
