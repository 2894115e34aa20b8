"""The preprocessing that a checkpoint states: transformers' `preprocessor_config.json`, timm's and torchvision's own.

transformers' classes of image processors differ in what the same fields mean. Those that only resize, cut, rescale and
normalise are read; ConvNext's, which ResNet uses, resizes to size / crop_pct and cuts, or squeezes from 384 pixels on.
Any other class is refused by name, because its accuracy would quietly be another one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moqe.data.preprocessing import Preprocessing
from moqe.errors import ModelError

FILE = "preprocessor_config.json"
_PLAIN = frozenset(
    {"BeitImageProcessor", "BitImageProcessor", "CLIPImageProcessor", "DeiTImageProcessor", "PvtImageProcessor"}
    | {"MobileNetV1ImageProcessor", "MobileNetV2ImageProcessor", "SiglipImageProcessor", "ViTImageProcessor"}
)
_CONVNEXT = "ConvNextImageProcessor"
_CONVNEXT_SQUEEZES_FROM = 384  # pixels
# Pillow's numbers, which transformers writes into files.
_INTERPOLATION = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}


def of_transformers(folder: Path) -> Preprocessing | None:
    """What the folder's preprocessor_config.json says, defaults of its class filled in; None without that file.

    Raises ModelError when it is damaged or asks for something that MoQE does not do.
    """
    if not (folder / FILE).is_file():
        return None
    from transformers import AutoImageProcessor

    try:
        # Pillow's backend has the same fields as torchvision's, and needs no torchvision.
        processor = AutoImageProcessor.from_pretrained(folder, backend="pil", local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
        raise ModelError(
            f"{folder / FILE} cannot be read ({_line(error)}): it is damaged, or of another library"
        ) from error
    return _read(type(processor).__name__.removesuffix("Pil"), processor.to_dict(), folder / FILE)


def _read(kind: str, fields: Mapping[str, Any], path: Path) -> Preprocessing:
    if kind not in _PLAIN and kind != _CONVNEXT:
        raise ModelError(
            f"{path} is for {kind}, whose steps MoQE does not know; known: {', '.join(sorted(_PLAIN | {_CONVNEXT}))}"
        )
    if fields.get("do_resize") is False:
        raise ModelError(f"{path} resizes nothing (do_resize: false), so images could not be batched: set do_resize")
    for name in ("do_pad", "do_flip_channel_order", "do_thumbnail", "do_rotate"):
        if fields.get(name):
            raise ModelError(f"{path} asks for {name}, which MoQE does not do: choose another checkpoint")
    resample = int(fields["resample"])
    if resample not in _INTERPOLATION:
        raise ModelError(f"{path}: resample {resample} is unknown; known: {_INTERPOLATION}")
    try:
        resize, crop = _convnext(fields) if kind == _CONVNEXT else _plain(fields)
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(
            f"{path} does not say what size images get (size {json.dumps(fields.get('size'))}, do_center_crop "
            f"{json.dumps(fields.get('do_center_crop'))}): add crop_size or a height and width"
        ) from error
    normalised = fields.get("do_normalize") is not False
    return Preprocessing(
        resize,
        crop,
        _channels(fields["image_mean"]) if normalised else (0.0, 0.0, 0.0),
        _channels(fields["image_std"]) if normalised else (1.0, 1.0, 1.0),
        _INTERPOLATION[resample],
        float(fields["rescale_factor"]) if fields.get("do_rescale") is not False else 1.0,
    )


def _convnext(fields: Mapping[str, Any]) -> tuple[int | tuple[int, int], tuple[int, int]]:
    edge = int(fields["size"]["shortest_edge"])
    if edge >= _CONVNEXT_SQUEEZES_FROM:
        return (edge, edge), (edge, edge)
    return int(edge / float(fields["crop_pct"])), (edge, edge)


def _plain(fields: Mapping[str, Any]) -> tuple[int | tuple[int, int], tuple[int, int]]:
    """Raises KeyError where neither a whole size nor a crop is stated: images of different shapes make no batch."""
    size = fields["size"]
    resize = int(size["shortest_edge"]) if size.get("shortest_edge") else _height_width(size)
    if fields.get("do_center_crop"):
        return resize, _height_width(fields["crop_size"])
    return resize, _height_width(size)


def _height_width(size: Mapping[str, Any]) -> tuple[int, int]:
    return int(size["height"]), int(size["width"])


def of_timm(config: Mapping[str, Any], name: str) -> Preprocessing:
    """What timm's data config says (`timm.data.resolve_model_data_config`), for evaluation.

    Raises ModelError for a way of cutting that is neither `center` nor `squash`, and for images without colour.
    """
    channels, height, width = config["input_size"]
    mode, interpolation = config.get("crop_mode") or "center", config["interpolation"]
    if channels != 3 or mode not in ("center", "squash") or interpolation not in _INTERPOLATION.values():
        raise ModelError(
            f"{name} takes {channels} channels, crop_mode {mode}, interpolation {interpolation}: MoQE does 3 channels, "
            "center or squash, and Pillow's interpolations"
        )
    scaled = math.floor(height / config["crop_pct"]), math.floor(width / config["crop_pct"])
    resize = scaled if mode == "squash" or height != width else scaled[0]
    return Preprocessing(resize, (height, width), _channels(config["mean"]), _channels(config["std"]), interpolation)


def of_torchvision(transforms: Any) -> Preprocessing:
    """What the transforms of a torchvision weights enum do (`ImageClassification`)."""
    size = transforms.crop_size[0]
    return Preprocessing(
        int(transforms.resize_size[0]),
        (int(size), int(size)),
        _channels(transforms.mean),
        _channels(transforms.std),
        str(transforms.interpolation.value),
    )


def _channels(values: Any) -> tuple[float, float, float]:
    if isinstance(values, int | float):
        values = (values,) * 3
    first, second, third = (float(value) for value in values)
    return first, second, third


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
