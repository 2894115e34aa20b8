"""Opening image classifiers, whatever library made them."""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
)

from moqe import recipe
from moqe.errors import ModelError, NumericalError, RecipeError
from moqe.models.checkpoint_preprocessing import of_timm, of_torchvision, of_transformers
from moqe.models.classifier import Classifier, open_classifier, same_labels

STATED = recipe.Preprocessing(crop=16, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
RESNET = {  # as microsoft/resnet-50 has it
    "crop_pct": 0.875,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "ConvNextFeatureExtractor",
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "resample": 3,
    "size": 56,
}
MOBILENET = {  # as google/mobilenet_v2_1.0_224 has it
    "crop_size": {"height": 48, "width": 40},
    "do_center_crop": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_processor_type": "MobileNetV2ImageProcessor",
    "image_std": [0.5, 0.5, 0.5],
    "resample": 2,
    "rescale_factor": 0.00392156862745098,
    "size": {"shortest_edge": 64},
}
SQUEEZED = {
    "image_processor_type": "ViTImageProcessor",
    "size": {"height": 24, "width": 32},
    "resample": 2,
    "do_rescale": False,
    "do_normalize": False,
}
FACTORIES = """
from torch import nn

class Net(nn.Module):
    def __init__(self, classes=4, outputs=1):
        super().__init__()
        self.conv, self.bn, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, classes)
        self.outputs = outputs

    def forward(self, x):
        logits = self.head(self.bn(self.conv(x)).mean((2, 3)))
        return logits if self.outputs == 1 else (logits,) * self.outputs

def net(): return Net().double()
def one(): return Net(1)
def pair(): return Net(4, 2)
def fails(): raise KeyError("no such thing")
def number(): return 3
def quantized():
    network = Net()
    network.conv = type("Conv2d", (nn.Module,), {"__module__": "torch.ao.nn.quantized.modules.conv"})()
    return network
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder with a module of factories."""
    (tmp_path / "my_nets.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_nets", raising=False)
    return tmp_path


def saved(folder: Path, processor: dict[str, object] | None = RESNET, **config: object) -> Path:
    torch.manual_seed(3)
    names = {0: "cat", 1: "dog", 2: "eel"}
    settings = {
        "embedding_size": 8,
        "hidden_sizes": [8, 16],
        "depths": [1, 1],
        "layer_type": "basic",
        "id2label": names,
    }
    ResNetForImageClassification(ResNetConfig(**(settings | config))).save_pretrained(folder)
    if processor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def test_a_folder_of_transformers(tmp_path):
    found = open_classifier(str(saved(tmp_path)))
    assert (found.classes, found.labels, found.name) == (3, ("cat", "dog", "eel"), str(tmp_path))
    model = ResNetForImageClassification.from_pretrained(tmp_path).eval()
    example = found.example()
    assert example.shape == (2, 3, 56, 56)
    assert torch.equal(found.network(example), model(example).logits)
    assert not found.network.training
    assert not any(parameter.requires_grad for parameter in found.network.parameters())


def test_labels_that_nobody_gave_are_none(tmp_path):
    assert open_classifier(str(saved(tmp_path, id2label={0: "LABEL_0", 1: "LABEL_1"}))).labels is None


@pytest.mark.parametrize("processor", [RESNET, MOBILENET, SQUEEZED], ids=["resnet", "mobilenet", "squeezed"])
@pytest.mark.parametrize("size", [(71, 93), (93, 71), (20, 20)], ids=str)
def test_preprocessing_equals_the_library_s_own(tmp_path, processor, size):
    from transformers import AutoImageProcessor

    (tmp_path / "config.json").write_text(json.dumps({"model_type": "resnet"}))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((size[1], size[0]), reducing_gap=None)
    own = of_transformers(tmp_path)
    theirs = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")(image, return_tensors="pt")["pixel_values"]
    ours = own.normalise(own.arrange(image, "image")[None])
    assert ours.shape == theirs.shape
    assert torch.allclose(ours, theirs.float(), atol=1e-5)


def test_convnext_squeezes_large_images(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "resnet"}))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(RESNET | {"size": {"shortest_edge": 384}}))
    found = of_transformers(tmp_path)
    assert (found.resize, found.crop) == ((384, 384), (384, 384))
    assert found.describe() == (
        "resize to 384 x 384 (bicubic), values x 1/255, mean 0.485 0.456 0.406, std 0.229 0.224 0.225"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"do_resize": False}, "resizes nothing"),
        ({"image_processor_type": "LevitImageProcessor"}, "is for LevitImageProcessor, whose steps MoQE does not know"),
        ({"do_center_crop": False, "size": {"shortest_edge": 64}}, "does not say what size images get"),
        ({"do_flip_channel_order": True}, "asks for do_flip_channel_order"),
        ({"resample": 9}, "resample 9 is unknown"),
    ],
)
def test_a_preprocessing_that_cannot_be_followed_needs_the_recipe_s(tmp_path, change, message):
    saved(tmp_path, MOBILENET | change)
    with pytest.raises(ModelError, match=message):
        of_transformers(tmp_path)
    with pytest.raises(RecipeError, match=f"does not say how images become its input .*{message}.*state data.prep"):
        open_classifier(str(tmp_path))
    assert open_classifier(str(tmp_path), preprocessing=STATED).preprocessing.mean == (0.5, 0.4, 0.3)


def test_the_checkpoint_s_own_preprocessing_wins(tmp_path, caplog):
    caplog.set_level(logging.WARNING, "moqe")
    saved(tmp_path)
    assert open_classifier(str(tmp_path), preprocessing=STATED).preprocessing.crop == (56, 56)
    assert "its own preprocessing is kept (shorter edge to 64 (bicubic), centre crop 56 x 56" in caplog.text


def test_timm_s_config():
    config = {"input_size": (3, 176, 176), "interpolation": "bicubic", "mean": (0.5,) * 3, "std": (0.25,) * 3}
    found = of_timm(config | {"crop_pct": 0.875, "crop_mode": "center"}, "timm:x")
    assert (found.resize, found.crop, found.interpolation) == (201, (176, 176), "bicubic")
    assert of_timm(config | {"crop_pct": 1.0, "crop_mode": "squash"}, "timm:x").resize == (176, 176)
    with pytest.raises(ModelError, match="timm:x takes 3 channels, crop_mode border"):
        of_timm(config | {"crop_pct": 1.0, "crop_mode": "border"}, "timm:x")
    with pytest.raises(ModelError, match="takes 1 channels"):
        of_timm(config | {"crop_pct": 1.0, "input_size": (1, 28, 28)}, "timm:x")


def test_torchvision_s_transforms():
    transforms = SimpleNamespace(
        crop_size=[224],
        resize_size=[232],
        mean=(0.4,) * 3,
        std=(0.2,) * 3,
        interpolation=SimpleNamespace(value="bilinear"),
    )
    assert of_torchvision(transforms).describe() == (
        "shorter edge to 232 (bilinear), centre crop 224 x 224, values x 1/255, mean 0.4 0.4 0.4, std 0.2 0.2 0.2"
    )


def test_a_factory_with_weights(here):
    first = open_classifier("my_nets:net", preprocessing=STATED)
    assert (first.classes, first.labels) == (4, None)
    assert {parameter.dtype for parameter in first.network.parameters()} == {torch.float32}
    state = {name: torch.randn(tensor.shape) for name, tensor in first.network.state_dict().items() if tensor.dim()}
    state["bn.running_var"] = state["bn.running_var"].abs()
    save_file({f"module.{name}": tensor for name, tensor in state.items()}, here / "w.safetensors")
    second = open_classifier("my_nets:net", "w.safetensors", STATED)
    assert all(torch.equal(second.network.state_dict()[name], tensor) for name, tensor in state.items())


@pytest.mark.usefixtures("here")
def test_a_factory_without_weights_is_the_same_every_time():
    first = open_classifier("my_nets:net", "", STATED)
    torch.rand(1)
    state = torch.random.get_rng_state()
    assert open_classifier("my_nets:net", "", STATED).digest == first.digest
    assert torch.equal(torch.random.get_rng_state(), state)


def changed(name: str, value: Tensor | None):
    def change(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key: tensor for key, tensor in (state | {name: value}).items() if tensor is not None}

    return change


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (changed("head.bias", None), ModelError, "does not fit Net: head.bias is missing"),
        (changed("tail.bias", torch.ones(4)), ModelError, "does not fit Net: tail.bias is unknown"),
        (changed("head.bias", torch.ones(5)), ModelError, r"head.bias has shape \(5,\), not \(4,\)"),
        (
            changed("head.weight", torch.ones(4, 4, dtype=torch.int8)),
            ModelError,
            "already quantized .head.weight is torch.int8",
        ),
        (changed("head.bias", torch.tensor([1.0, 2, 3, torch.nan])), NumericalError, "head.bias .* not finite"),
        (lambda state: {}, ModelError, "holds no parameters"),
    ],
)
def test_weights_that_do_not_fit(here, change, error, message):
    state = open_classifier("my_nets:net", "", STATED).network.state_dict()
    del state["bn.num_batches_tracked"]
    save_file(state, here / "right.safetensors")
    open_classifier("my_nets:net", "right.safetensors", STATED)
    save_file(change(state), here / "w.safetensors")
    with pytest.raises(error, match=message):
        open_classifier("my_nets:net", "w.safetensors", STATED)


def test_weights_that_are_no_weights(here):
    (here / "w.pth").write_bytes(b"")
    (here / "w.safetensors").write_bytes(b"nothing")
    for name, message in (
        ("w.pth", "unpickles nothing"),
        ("w.safetensors", "cannot be read"),
        ("no.safetensors", "not exist"),
    ):
        with pytest.raises(ModelError, match=message):
            open_classifier("my_nets:net", name, STATED)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("my_nets:nett", "my_nets has no function 'nett'; did you mean 'net'"),
        ("your_nets:net", "No module named 'your_nets'; install the package, or run from the folder"),
        ("my_nets:fails", "my_nets:fails failed .KeyError: 'no such thing'"),
        ("my_nets:number", "my_nets:number returned int, not a torch.nn.Module"),
        ("my_nets:one", "returns one logit"),
        ("my_nets:pair", "returns tuple for one image, not logits"),
        ("my_nets:quantized", "my_nets:quantized is already quantized"),
        ("./nowhere", "is no local folder and cannot be fetched"),
        ("a/b/c", "is not a folder, a hub id"),
    ],
)
def test_bases_that_are_none(base, message):
    with pytest.raises(ModelError, match=message):
        open_classifier(base, "", STATED)


@pytest.mark.usefixtures("here")
def test_importing_a_factory_leaves_the_path_alone():
    before = list(sys.path)
    open_classifier("my_nets:net", "", STATED)
    assert sys.path == before


@pytest.mark.usefixtures("here")
def test_a_factory_needs_a_preprocessing_with_a_size():
    with pytest.raises(RecipeError, match=r"my_nets:net does not say how images become its input: state data.prep"):
        open_classifier("my_nets:net")
    with pytest.raises(RecipeError, match="states no size: add crop"):
        open_classifier("my_nets:net", "", STATED.model_copy(update={"crop": None}))
    resized = open_classifier("my_nets:net", "", STATED.model_copy(update={"crop": None, "resize": 20}))
    assert resized.preprocessing.size == (20, 20)
    with pytest.raises(ModelError, match=r"Net cannot run on images of shape \(1, 3, 2, 2\)"):
        open_classifier("my_nets:net", "", STATED.model_copy(update={"crop": 2}))


def test_folders_that_do_not_hold_what_they_say(tmp_path):
    saved(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    save_file(
        {k: v for k, v in state.items() if "classifier" not in k}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(ModelError, match=r"missing keys classifier.1.bias, classifier.1.weight \(2 in all\)"):
        open_classifier(str(tmp_path))
    save_file(
        state | {"classifier.1.bias": torch.full((3,), torch.inf)}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(NumericalError, match=r"classifier.1.bias of .* not finite"):
        open_classifier(str(tmp_path))
    save_file(state | {"classifier.1.bias": torch.ones(9)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"cannot be opened|mismatched keys"):
        open_classifier(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "quanto"}}))
    with pytest.raises(ModelError, match=r"is already quantized .quantization_config in config.json: quanto"):
        open_classifier(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    with pytest.raises(ModelError, match="cannot be opened as an image classifier"):
        open_classifier(str(tmp_path))


def test_weights_have_no_effect_on_what_holds_its_own(tmp_path):
    with pytest.raises(RecipeError, match="weights has no effect"):
        open_classifier(str(saved(tmp_path)), "w.safetensors")


def test_the_digest_names_weights_architecture_and_preprocessing(tmp_path):
    first = open_classifier(str(saved(tmp_path / "a")))
    assert open_classifier(str(saved(tmp_path / "b"))).digest == first.digest
    digests = {first.digest}
    digests.add(open_classifier(str(saved(tmp_path / "c", RESNET | {"resample": 2}))).digest)
    digests.add(open_classifier(str(saved(tmp_path / "d", hidden_act="relu6"))).digest)
    state = load_file(tmp_path / "b" / "model.safetensors")
    state["classifier.1.bias"][0] += 1e-6
    save_file(state, tmp_path / "b" / "model.safetensors", {"format": "pt"})
    digests.add(open_classifier(str(tmp_path / "b")).digest)
    assert len(digests) == 4


def test_what_ships_with_moqe():
    found = open_classifier("bundled:digits-resnet")
    assert (found.classes, found.labels) == (10, tuple("0123456789"))
    assert found.preprocessing.size == (8, 8)
    with pytest.raises(RecipeError, match="did you mean 'digits-resnet'"):
        open_classifier("bundled:digit-resnet")


def test_mobilenet_of_transformers(tmp_path):
    MobileNetV2ForImageClassification(MobileNetV2Config(depth_multiplier=0.35, num_labels=5)).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(MOBILENET))
    found = open_classifier(str(tmp_path))
    assert found.network(found.example(3)).shape == (3, 5)
    assert found.example().shape == (2, 3, 48, 40)


def named(labels: tuple[str, ...] | None, classes: int = 2) -> Classifier:
    network = nn.Identity()
    opened = Classifier(network, classes, labels, None, "first", "")  # type: ignore[arg-type]
    return replace(opened, name="-".join(labels or ("nameless",)))


def test_experts_of_one_mixture_have_the_same_labels():
    same_labels(named(("cat", "dog")), named(("Cat", "dog")))
    same_labels(named(("cat", "dog")), named(None))
    with pytest.raises(ModelError, match="cat-dog has 2 classes and nameless has 3"):
        same_labels(named(("cat", "dog")), named(None, 3))
    with pytest.raises(ModelError, match="class 0 is 'cat' in cat-dog and 'dog' in dog-cat"):
        same_labels(named(("cat", "dog")), named(("dog", "cat")))


class FakeTimm(ModuleType):
    """As much of timm as is called."""

    def __init__(self) -> None:
        super().__init__("timm")
        config = {
            "input_size": (3, 20, 20),
            "interpolation": "bilinear",
            "mean": (0,) * 3,
            "std": (1,) * 3,
            "crop_pct": 1.0,
        }
        self.data = SimpleNamespace(resolve_model_data_config=lambda network: config)
        self.asked: list[tuple[str, bool]] = []

    def create_model(self, name: str, pretrained: bool) -> nn.Module:
        self.asked.append((name, pretrained))
        if name != "tiny":
            raise RuntimeError(f"Unknown model ({name})")
        return nn.Sequential(nn.Flatten(), nn.Linear(1200, 3))

    def list_models(self) -> list[str]:
        return ["tiny", "other"]


def test_timm(tmp_path, monkeypatch):
    timm = FakeTimm()
    monkeypatch.setitem(sys.modules, "timm", timm)
    assert open_classifier("timm:tiny").preprocessing.size == (20, 20)
    save_file({"1.weight": torch.ones(3, 1200), "1.bias": torch.zeros(3)}, tmp_path / "w.safetensors")
    found = open_classifier("timm:tiny", str(tmp_path / "w.safetensors"))
    assert float(found.network(torch.ones(1, 3, 20, 20))[0, 0]) == 1200
    assert timm.asked == [("tiny", True), ("tiny", False)]
    with pytest.raises(ModelError, match=r"timm cannot open 'tinny' .*did you mean 'tiny'"):
        open_classifier("timm:tinny")


def test_libraries_that_are_missing(monkeypatch):
    for name in ("timm", "torchvision", "torchvision.models"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModelError, match=r"base timm:resnet18 needs timm, which .*: pip install timm$"):
        open_classifier("timm:resnet18")
    with pytest.raises(
        ModelError, match=r"base torchvision.models:resnet18 needs torchvision.*: pip install torchvision$"
    ):
        open_classifier("torchvision.models:resnet18")
