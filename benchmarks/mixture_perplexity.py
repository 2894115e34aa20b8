"""Does a whole mixture say the same in another runtime? Perplexity of the mixture and of each expert on real text.

    python -m benchmarks.mixture_perplexity MIXTURE [--text FILE] [--runtimes llama.cpp packed] [--windows 40]

MIXTURE is a built folder. The text is tokenized from its start; without one, windows are taken evenly from the test
samples of the mixture's recipe. The router sees the same tokens everywhere and chooses the same expert, so that what
differs is the arithmetic: llama.cpp runs GGUF files, written on the way without loss where groups are of 32, and rounds
activations to 8 bits. Ratios are of perplexity to the reference runtime's on the same windows. `benchmarks.latency`
leaves a mixture of four 4-bit experts of SmolLM2-135M in `<work>/mixture/mixture`; `recipes/
tiny-qwen3-specialists-gguf.yaml` is one whose router has something to choose.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

import moqe
from benchmarks.tables import table, write_section
from moqe.data.splits import make_splits
from moqe.mixture import LanguageMixture
from moqe.progress import Silent

REFERENCE, MIXTURE = "reference", "mixture"


def losses(mixture: LanguageMixture, windows: Tensor) -> dict[str, float]:
    """Mean loss by name, nats per token: of the mixture and of every expert, window by window, int64 (n, t)."""
    found = {}
    for name, expert in ((MIXTURE, None), *((name, name) for name in mixture.experts)):
        nats = [mixture.score(window, expert=expert).nats for window in windows]
        found[name] = sum(nats) / windows[:, 1:].numel()
    return found


def read_windows(mixture: LanguageMixture, text: Path | None, windows: int, window: int) -> Tensor:
    """Token ids, int64 (windows, tokens): `window` each from the start of a text, or test samples of the recipe."""
    if text is None:
        test = make_splits(mixture.recipe.data, mixture.tokenizer, mixture.recipe.seed, Silent()).test.tokens
        if len(test) < windows:
            raise SystemExit(f"the recipe has {len(test)} test windows and {windows} are asked for: lower --windows")
        return test[torch.arange(windows) * len(test) // windows]
    count = windows * window
    ids = mixture.tokenizer(text.read_text(encoding="utf-8")[: 10 * count])["input_ids"][:count]
    if len(ids) < count:
        raise SystemExit(f"{text} has {len(ids)} tokens and {count} are asked for: lower --windows")
    return torch.tensor(ids).view(windows, window)


def main() -> None:
    """Read the command line, compare, write the section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mixture", type=Path)
    parser.add_argument("--text", type=Path, help="by default the test samples of the mixture's recipe")
    parser.add_argument("--out", type=Path, default=Path("docs/performance.md"))
    parser.add_argument("--section", default="mixture-perplexity", help="of the document, which is replaced")
    parser.add_argument("--model", help="what the document calls the model; by default the last part of its path")
    parser.add_argument("--runtimes", nargs="+", default=["llama.cpp", "packed", "packed-float32"])
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found: dict[str, dict[str, float]] = {}
    chosen: Counter[str] = Counter()
    for name in (REFERENCE, *options.runtimes):
        mixture = moqe.load(options.mixture, runtime=name)
        assert isinstance(mixture, LanguageMixture)
        windows = read_windows(mixture, options.text, options.windows, options.window)
        found[name] = losses(mixture, windows)
        chosen = chosen or Counter(mixture.route(window).expert for window in windows)
    rows = [
        [
            line,
            f"{math.exp(loss):.3f}",
            *(f"{100 * math.expm1(found[name][line] - loss):+.3f} %" for name in options.runtimes),
        ]
        for line, loss in found[REFERENCE].items()
    ]
    made = "; ".join(
        f"{e.name}: {e.method} {e.scheme}, groups of {e.group_size}, {'' if e.symmetric else 'a'}symmetric"
        for e in mixture.recipe.experts
    )
    shares = ", ".join(f"{name} {count}" for name, count in chosen.most_common())
    source = f"the start of {options.text.name}" if options.text else "the test samples of its recipe"
    text = f"""
## A whole mixture in other runtimes: {options.model or Path(mixture.recipe.base).name}

Perplexity on {len(windows)} windows of {windows.shape[1]} tokens from {source}, and how far
other runtimes are from the reference's, window by window. Windows the router sent where: {shares}.
{made}.

{table(["line", "reference", *options.runtimes], rows)}
"""
    print(text)
    write_section(options.out, options.section, text)


if __name__ == "__main__":
    main()
