"""A policy on disk: `policy.json` beside the router that it works on, with what was seen when it was fitted."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path

from moqe.errors import CheckpointError
from moqe.router.cascade import Cascade, CascadeDecision
from moqe.store import read_json, write_json

FORMAT = 1
FILE = "policy.json"


def save_cascade(decision: CascadeDecision, folder: Path) -> None:
    """Write a fitted cascade into `folder`. An infinite standard error, of one sample, is null."""
    gain = asdict(decision.gain)
    if not math.isfinite(decision.gain.standard_error):
        gain["standard_error"] = None
    content = {
        "format": FORMAT,
        "policy": "cascade",
        "threshold": decision.cascade.threshold,
        "second": list(decision.cascade.second),
        "always_first": decision.cascade.always_first,
        "kept": decision.kept,
        "gain": gain,
        "cost": decision.cost,
    }
    write_json(folder / FILE, content)


def load_cascade(folder: Path, experts: int) -> Cascade:
    """Read the cascade in `folder`, which is for so many experts.

    Raises CheckpointError when the file is missing, of another format, or does not fit the experts.
    """
    path = folder / FILE
    content = read_json(path)
    try:
        if content["format"] != FORMAT or content["policy"] != "cascade":
            raise CheckpointError(f"{path} is of another version or policy: build the router again")
        always = content["always_first"]
        cascade = Cascade(
            float(content["threshold"]),
            tuple(int(expert) for expert in content["second"]),
            None if always is None else int(always),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} does not describe a cascade: build the router again") from error
    named = [*cascade.second, *([] if cascade.always_first is None else [cascade.always_first])]
    fits = len(cascade.second) == experts and all(0 <= expert < experts for expert in named)
    if not fits or any(first == second for first, second in enumerate(cascade.second)):
        raise CheckpointError(f"{path} is not for these {experts} experts: build the router again")
    return cascade
