"""Train `bundled:digits-resnet` on the first 497 of scikit-learn's digits.

    python scripts/train_digits_resnet.py OUT

Notable choices
- Only `bundled:digits/train` is read in training. Router and test images choose nothing: the recipe below was fixed
  in advance, and the last step is kept.
- Every image is rotated, stretched, sheared and moved a little each time: 497 images are few.
- AdamW with one cycle of the rate. Everything random comes from the seed; one thread, so that the order of additions,
  and with it every bit, is the same on a machine of the same kind.
"""

from __future__ import annotations

import argparse
import logging
import platform
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from moqe.bundled.digits import SIDE, digits_images
from moqe.bundled.digits_resnet import DigitsResNet
from moqe.store import digest_file, write_json

EPOCHS, BATCH = 80, 64
RATE, WEIGHT_DECAY = 5e-3, 0.05
ROTATION, STRETCH, SHEAR, SHIFT = 0.2, 0.15, 0.2, 0.15  # radians, factors, factor, share of half the side
log = logging.getLogger("train_digits_resnet")


def read(part: str) -> tuple[Tensor, Tensor]:
    """Images, float32 (n, 3, 8, 8) between -1 and 1, and labels, int64 (n,)."""
    rows = digits_images(part)
    pixels = np.stack([np.frombuffer(content[-SIDE * SIDE :], np.uint8).reshape(SIDE, SIDE) for _, content, _ in rows])
    grey = torch.from_numpy(pixels).float()[:, None] / 127.5 - 1.0
    return grey.expand(-1, 3, -1, -1).contiguous(), torch.tensor([label for _, _, label in rows])


def distort(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image under a small random affine map; what comes in from outside is black."""

    def draw(spread: float) -> Tensor:
        return (torch.rand(len(images), generator=generator) * 2 - 1) * spread

    angle, shear = draw(ROTATION), draw(SHEAR)
    across, down = 1 + draw(STRETCH), 1 + draw(STRETCH)
    maps = torch.stack(
        [
            torch.stack([across * angle.cos(), shear - angle.sin(), draw(SHIFT)], 1),
            torch.stack([angle.sin(), down * angle.cos(), draw(SHIFT)], 1),
        ],
        1,
    )  # (n, 2, 3)
    grid = functional.affine_grid(maps, list(images.shape), align_corners=False)
    return functional.grid_sample(images + 1.0, grid, align_corners=False) - 1.0


def train(seed: int) -> DigitsResNet:
    """The trained network, in evaluation mode."""
    images, labels = read("train")
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    network = DigitsResNet().train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=WEIGHT_DECAY)
    steps = EPOCHS * (len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=RATE, total_steps=steps)
    for epoch in range(EPOCHS):
        order = torch.randperm(len(images), generator=generator)
        for rows in order[: len(images) // BATCH * BATCH].split(BATCH):
            optimizer.zero_grad()
            logits = network(distort(images[rows], generator))
            loss = functional.cross_entropy(logits, labels[rows])
            loss.backward()
            optimizer.step()
            schedule.step()
        if epoch % 10 == 9:
            log.info("epoch %d of %d, loss %.3f", epoch + 1, EPOCHS, loss.item())
    return network.eval()


@torch.inference_mode()
def measure(network: DigitsResNet, part: str) -> dict[str, float | int]:
    """Top-1 accuracy and cross-entropy (nats per image) on a part."""
    images, labels = read(part)
    logits = network(images)
    return {
        "images": len(labels),
        "top1": float((logits.argmax(1) == labels).double().mean()),
        "cross_entropy": float(functional.cross_entropy(logits.double(), labels)),
    }


def main() -> None:
    """Read the command line, train, write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the network")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    start = time.monotonic()
    network = train(options.seed)
    seconds = time.monotonic() - start
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in network.state_dict().items()}, out / "model.safetensors")
    report = {
        "seed": options.seed,
        "steps": EPOCHS * (measure(network, "train")["images"] // BATCH),
        "seconds": round(seconds),
        "parameters": sum(p.numel() for p in network.parameters()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "parts": {part: measure(network, part) for part in ("train", "router", "test")},
    }
    write_json(out / "training.json", report)
    log.info("%s", report)
    write_json(out / "digests.json", {name: digest_file(out / name) for name in ("model.safetensors", "training.json")})


if __name__ == "__main__":
    main()
