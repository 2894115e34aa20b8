"""Does a server say what the expert says whose files it serves? Perplexity and greedy tokens of an expert behind a URL.

    python -m benchmarks.server_perplexity MIXTURE EXPERT --url URL [--text FILE] [--runtimes bfloat16 packed]

URL is that of an OpenAI-compatible server (`http://localhost:8000/v1`) that serves the exported EXPERT under its name.
Windows are those of `benchmarks.mixture_perplexity`; the prompt is the beginning of the first. All is compared with the
reference runtime in this process, and RUNTIMES of this package beside it say how far arithmetic of their kind is.
"""

from __future__ import annotations

import argparse
import math
import operator
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

import moqe
from benchmarks.mixture_perplexity import REFERENCE, read_windows
from benchmarks.tables import table
from moqe.mixture import LanguageMixture
from moqe.runtimes.remote import RemoteRuntime
from moqe.runtimes.runtime import Runtime

SERVER = "server"
PROMPT = 40  # tokens of the first window


def compare(runtimes: Mapping[str, Runtime], windows: Tensor, new: int) -> dict[str, tuple[float, int]]:
    """Perplexity over the first runtime's on windows, int64 (n, t), and how many of `new` greedy tokens are its."""
    scored = {name: float(runtime.score(windows).double().mean()) for name, runtime in runtimes.items()}
    prompt = windows[:1, :PROMPT]
    tokens = {name: runtime.generate(prompt, new) for name, runtime in runtimes.items()}
    first = next(iter(runtimes))
    same = {name: sum(map(operator.eq, tokens[first], found)) for name, found in tokens.items()}
    return {name: (math.exp(loss - scored[first]), same[name]) for name, loss in scored.items()}


def main() -> None:
    """Read the command line, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mixture", type=Path)
    parser.add_argument("expert")
    parser.add_argument("--url", required=True)
    parser.add_argument("--text", type=Path, help="by default the test samples of the mixture's recipe")
    parser.add_argument("--runtimes", nargs="+", default=["bfloat16", "packed"])
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--new", type=int, default=12, help="greedy tokens")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    runtimes: dict[str, Runtime] = {}
    for name in (REFERENCE, *options.runtimes):
        mixture = moqe.load(options.mixture, runtime=name)
        assert isinstance(mixture, LanguageMixture)
        runtimes[name] = mixture.runtime(options.expert)
        windows = read_windows(mixture, options.text, options.windows, options.window)
    runtimes[SERVER] = RemoteRuntime(options.url, options.expert)
    rows = [
        [name, f"{ratio:.4f}", f"{same} of {options.new}"]
        for name, (ratio, same) in compare(runtimes, windows, options.new).items()
    ]
    print(table(["runtime", "perplexity / reference", "greedy tokens of the reference"], rows))


if __name__ == "__main__":
    main()
