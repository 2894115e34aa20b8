"""MoQE's side of `benchmarks.peers`: all experts of a recipe in one pass, in a process of its own.

    python -m benchmarks.peers_ours RECIPE FOLDER THREADS

Prints one line of JSON: seconds from opening the model to the last file, and the peak memory of the process. Texts are
read and cut into tokens before, as the other side gets tokens.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path

import torch

from moqe.progress import Silent
from moqe.recipe import load_recipe
from moqe.tasks import LanguageTask


def main() -> None:
    """Make the experts, report."""
    recipe, folder, threads = load_recipe(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(threads)
    splits = LanguageTask(recipe, folder).splits()
    start = time.perf_counter()
    task = LanguageTask(recipe, folder)
    task._splits = dict(splits)
    task.make_experts(Silent())
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    sys.stdout.write(json.dumps({"seconds": seconds, "peak_bytes": peak}) + "\n")


if __name__ == "__main__":
    main()
