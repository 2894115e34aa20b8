"""Does the packed runtime say what the reference runtime says? Divergence, top-1 agreement and perplexity on real text.

    python -m benchmarks.packed_agreement EXPERTS --text FILE [--windows 4] [--window 256] [--threads 1]

EXPERTS is the `experts` folder of a mixture, with `shared` beside it; the text is tokenized from its start.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.tables import table
from moqe.formats import open_expert
from moqe.formats.compressed_tensors import SHARED_TENSORS
from moqe.models.shared import open_shared
from moqe.runtimes.packed.runtime import PRECISIONS
from moqe.runtimes.texts import TEXT_RUNTIMES

HEADER = [
    "expert",
    "runtime",
    "KL, nats per token",
    "largest difference of logits",
    "top-1 agreement",
    "perplexity ratio",
]


def compare(expected: Tensor, found: Tensor) -> tuple[float, float, float]:
    """Mean divergence in nats, largest difference, and how often the likeliest token is the same, of logits."""
    ours, theirs = (torch.log_softmax(logits.double(), -1) for logits in (expected, found))
    divergence = (ours.exp() * (ours - theirs)).sum(-1).mean()
    same = (expected.argmax(-1) == found.argmax(-1)).double().mean()
    return float(divergence), float((expected - found).abs().max()), float(same)


def main() -> None:
    """Read the command line, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experts", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    place = options.experts.parent / "shared"
    shared = open_shared(place, place / SHARED_TENSORS)
    count = options.windows * options.window
    ids = shared.tokenizer(options.text.read_text(encoding="utf-8")[: 10 * count])["input_ids"][:count]
    windows = torch.tensor(ids).view(options.windows, options.window)
    rows = []
    for path in sorted(path for path in options.experts.iterdir() if path.is_dir()):
        reference = TEXT_RUNTIMES["reference"](shared.model, "cpu").open(open_expert(path), path.name)
        losses = reference.score(windows).double().mean()
        for name in PRECISIONS:
            runtime = TEXT_RUNTIMES[name](shared.model, "cpu").open(open_expert(path), path.name)
            parts = [compare(reference.logits(window[None]), runtime.logits(window[None])) for window in windows]
            divergence, same = (sum(part[i] for part in parts) / len(parts) for i in (0, 2))
            ratio = float((runtime.score(windows).double().mean() - losses).exp())
            largest = max(part[1] for part in parts)
            numbers = [f"{divergence:.1e}", f"{largest:.1e}", f"{100 * same:.1f} %", f"{ratio:.4f}"]
            rows.append([path.name, name, *numbers])
    print(table(HEADER, rows))


if __name__ == "__main__":
    main()
