"""Latency as ratios of contestants that take turns in one run.

    python -m benchmarks.latency --work FOLDER [--only PART] [--smollm2 FOLDER] [--threads 2] [--json FILE] [--out FILE]

Prints a table and JSON; `--out` puts the table into a document. FOLDER keeps the models that are timed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import latency_language, latency_mixture, latency_vision
from benchmarks.tables import write_section
from moqe.store import write_json

# What is measured: (folder, threads, rounds, seconds per turn) to numbers, and numbers to a section of the document.
PARTS: dict[str, tuple[Callable[..., dict[str, Any]], Callable[[dict[str, Any]], str]]] = {
    "language": (latency_language.measure, latency_language.report),
    "mixture": (latency_mixture.measure, latency_mixture.report),
    "vision": (latency_vision.measure, latency_vision.report),
}


def main() -> None:
    """Read the command line, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--only", choices=PARTS, action="append", help="may be given several times; all by default")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds-per-turn", type=float, default=0.5)
    parser.add_argument(
        "--smollm2", type=Path, help="the folder of SmolLM2-135M, a second model for `language`, and that of `mixture`"
    )
    parser.add_argument("--json", type=Path, help="where to keep the numbers")
    parser.add_argument("--out", type=Path, help="a Markdown document whose section is replaced")
    options = parser.parse_args()
    found = {}
    for name in options.only or PARTS:
        measure, report = PARTS[name]
        own = {"smollm2": options.smollm2} if name != "vision" else {}
        found[name] = measure(options.work / name, options.threads, options.rounds, options.seconds_per_turn, **own)
        print(report(found[name]))
        if options.out:
            write_section(options.out, f"latency-{name}", report(found[name]))
    print(json.dumps(found, indent=2))
    if options.json:
        write_json(options.json, found)


if __name__ == "__main__":
    main()
