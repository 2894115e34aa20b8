"""Latency of image experts in ONNX Runtime: int8 against full precision, and a mixture against one expert.

The network is ResNet-50 as transformers configures it by default, with random weights: kernels take the same time
whatever the numbers are. It goes the way of every expert: fold, quantize with ptq, write, run. The mixture does what
`ImageMixture` does for one batch: the base model's first convolution and its pooling, the paper's router behind it, and
then an expert.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetForImageClassification

from benchmarks.interleaved import Spread, ratios, seconds_per_round
from benchmarks.tables import table
from moqe.formats.onnx_biases import integer_biases
from moqe.formats.onnx_stem import write_onnx_stem
from moqe.formats.onnx_writer import write_onnx_expert
from moqe.methods.vision import VISION_METHODS, Job
from moqe.models.classifier import Logits
from moqe.models.convolutions import blocks, fold_batch_norms, observe_layers
from moqe.models.image_features import first_stage, stem_pooling, stem_thinning
from moqe.progress import Silent
from moqe.recipe import Expert
from moqe.router.image_network import ImageNetwork
from moqe.router.onnx_network import NETWORK, OnnxNetwork, write_network
from moqe.runtimes.onnx import OnnxRuntime
from moqe.schemes import scheme

IMAGE = (3, 224, 224)
CALIBRATION_IMAGES = 8
EXPERTS = 4
BATCHES = (1, 32)


class Noise:
    """Calibration images of noise."""

    def __init__(self, count: int) -> None:
        self.images = noise(count, seed=1)
        self.labels = torch.zeros(count, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, rows: Tensor) -> Tensor:
        """The images of these rows."""
        return self.images[rows]


def noise(count: int, seed: int) -> Tensor:
    """Normal noise as images, (count, 3, 224, 224)."""
    return torch.randn(count, *IMAGE, generator=torch.Generator().manual_seed(seed))


def write_files(folder: Path) -> None:
    """ResNet-50 as `float.onnx` and `int8.onnx`, and its first convolution as `stem.onnx`, unless they are there."""
    if (folder / "stem.onnx").exists():
        return
    torch.manual_seed(0)
    model = ResNetForImageClassification(ResNetConfig(num_labels=1000))
    network: nn.Module = Logits(model).eval().requires_grad_(False)
    example = noise(2, seed=0)
    folded = fold_batch_norms(network, example).network
    sites = observe_layers(folded, example)
    expert = Expert(name="int8", method="ptq", scheme="w8a8")
    images = Noise(CALIBRATION_IMAGES)
    job = Job(folded, sites, blocks(folded, example), images, scheme(expert.scheme), expert, 0, Silent())
    fitted = VISION_METHODS[expert.method].fit(job)
    write_onnx_expert(folder / "float.onnx", folded, (), IMAGE)
    write_onnx_expert(folder / "int8.onnx", folded, integer_biases(fitted.layers), IMAGE)
    shape = first_stage(folded, sites[0].name, example).shape[1:]
    write_onnx_stem(folder / "stem.onnx", folded, sites[0].name, IMAGE, stem_thinning(*shape), *stem_pooling(*shape))


class Mixture:
    """Stem, router and one expert, with a router that has not been trained."""

    def __init__(self, stem: OnnxRuntime, expert: OnnxRuntime) -> None:
        self.stem, self.expert = stem, expert
        features = stem.logits(noise(1, seed=0))
        path = stem.path.with_name(NETWORK)
        if not path.exists():
            write_network(path, ImageNetwork(features.shape[1], EXPERTS), features.shape[1])
        self.network = OnnxNetwork(path)

    def choose(self, images: Tensor) -> Tensor:
        """The expert of each image, (b,)."""
        logits: Tensor = self.network(self.stem.logits(images))  # (b, experts)
        return logits.argmax(1)

    def logits(self, images: Tensor) -> Tensor:
        """Choose, then let an expert answer; which one takes the same time."""
        self.choose(images)
        return self.expert.logits(images)


def measure(folder: Path, threads: int, rounds: int, seconds_per_turn: float) -> dict[str, Any]:
    """Seconds and ratios at every batch size, ready for JSON. folder: keeps the files."""
    torch.set_num_threads(threads)
    write_files(folder)
    full, int8 = (OnnxRuntime(folder / f"{file}.onnx", threads) for file in ("float", "int8"))
    stem = OnnxRuntime(folder / "stem.onnx", threads=1)
    executed = {"float": full.executed(), "int8": int8.executed()}
    mixture = Mixture(stem, int8)
    rows = []
    for batch in BATCHES:
        images = noise(batch, seed=2)
        contestants = {
            "float": lambda images=images: full.logits(images),
            "int8": lambda images=images: int8.logits(images),
            "mixture": lambda images=images: mixture.logits(images),
        }
        seconds = seconds_per_round(contestants, rounds, seconds_per_turn)
        rows.append(
            {
                "batch": batch,
                "milliseconds": {name: asdict(Spread.of([1e3 * s for s in found])) for name, found in seconds.items()},
                "float_over_int8": asdict(ratios(seconds["float"], seconds["int8"])),
                "mixture_over_int8": asdict(ratios(seconds["mixture"], seconds["int8"])),
            }
        )
    return {"threads": threads, "rounds": rounds, "executed": executed, "batches": rows}


def report(found: dict[str, Any]) -> str:
    """The section of docs/results.md."""
    rows = [
        [
            str(row["batch"]),
            *(f"{row['milliseconds'][name]['median']:.1f}" for name in ("float", "int8", "mixture")),
            Spread(**row["float_over_int8"]).text(),
            Spread(**row["mixture_over_int8"]).text(3),
        ]
        for row in found["batches"]
    ]
    int8 = found["executed"]["int8"]
    header = ["batch", "float, ms", "int8, ms", "mixture, ms", "float / int8", "mixture / int8"]
    return f"""
## Latency of image experts

ResNet-50's shapes, 224 x 224, random weights, ptq `w8a8`, ONNX Runtime with {found["threads"]} threads;
{int8["integer"]} layers of the int8 expert run as integers and {int8["float"]} in float. The mixture is stem, paper's
router and one int8 expert. Ratios are made in each of {found["rounds"]} interleaved rounds: median (smallest to
largest).

{table(header, rows)}
"""
