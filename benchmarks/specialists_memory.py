"""What the specialists of `benchmarks.specialists` win when only some of their blocks have scales of their own.

Blocks are ranked as `specialists.memory` ranks them, on windows that routers were trained on, and scored on the test
windows that the learned router sends to a specialist. Folders are made of links, as a build makes them, and bytes are
counted on them.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moqe.cli import Bars
from moqe.data.protocols import reduce
from moqe.evaluate import read_losses
from moqe.formats import open_expert
from moqe.formats.compressed_tensors import SHARED_TENSORS
from moqe.methods.distill import Student, Targets
from moqe.models.decoder import Decoder
from moqe.models.device import product_dtype
from moqe.models.shared import open_shared
from moqe.quantized import IntegerTensor
from moqe.runtimes.reference import ReferenceRuntime
from moqe.store import link
from moqe.tasks import LanguageTask
from moqe.tasks.allotment import Unit, allot, block_gains

SHARES = (0.25, 0.5, 0.75)  # of the bytes that all own scales take; beside them nothing and everything
_GAIN_WINDOWS, _ROWS = 8, 8


def memory_curve(task: LanguageTask, folder: Path, found: Mapping[str, Any], protocol: str, bars: Bars) -> Any:
    """For every bound the bytes, in those of one expert, and the mixture's loss of each test window.

    found: what each way of choosing scored under `protocol`, from which the router's choices are read.
    """
    ways = found["ways"]
    family = [name for name in ways if name == "generalist" or name.startswith("for-")]
    specialists = [name for name in family if name != "generalist"]
    mixture = np.asarray(ways["router mixture"])
    choice = {name: np.flatnonzero(np.asarray(ways[name]) == mixture) for name in specialists}
    shared = open_shared(folder / "shared", folder / "shared" / SHARED_TENSORS).model
    units = _units(task, folder, shared, specialists, bars)
    one, samples = _bytes([folder / "experts" / "generalist"]), task.splits()["test"]
    products = torch.bfloat16 if task.runtime_name == "bfloat16" else torch.float32
    curve = [{"memory": 1.0, "loss": _with(mixture, choice, np.asarray(ways["generalist"])).tolist()}]
    everything = sum(unit.bytes for unit in units)
    for share in SHARES:
        chosen = allot(units, int(share * everything))
        loss, places = mixture.copy(), [folder / "experts" / "generalist"]
        with bars.track(f"{share} of all scales", len(specialists)) as advance:
            for name in specialists:
                own = {unit.block for unit in chosen if unit.expert == name}
                place = _mixed(folder, name, own)
                places.append(place)
                if len(choice[name]):
                    runtime = ReferenceRuntime(shared, open_expert(place), name=name, products=products)
                    nats = runtime.score(samples.select(choice[name].tolist()).tokens)
                    loss[choice[name]] = reduce(nats, protocol).loss_sum
                advance(1)
        curve.append({"memory": _bytes(places) / one, "loss": loss.tolist()})
        shutil.rmtree(folder / "mixed")
    places = [folder / "experts" / name for name in family]
    curve.append({"memory": _bytes(places) / one, "loss": mixture.tolist()})
    return curve


def _with(loss: Any, choice: Mapping[str, Any], other: Any) -> Any:
    """The losses with those of routed windows replaced."""
    found = loss.copy()
    for rows in choice.values():
        found[rows] = other[rows]
    return found


def _units(task: LanguageTask, folder: Path, shared: nn.Module, specialists: Sequence[str], bars: Bars) -> list[Unit]:
    """What every block of every specialist is worth, on windows of its domain that trained routers."""
    decoder: Decoder = task.decoder
    samples = task.splits()["router_train"]
    losses = read_losses(folder / "losses.parquet", "router_train", task.protocols[0], task.metric)
    general = open_expert(folder / "experts" / "generalist")
    student = Student(shared, general)
    dtype = product_dtype("cpu", "auto")
    weight = 0.0 if task.recipe.specialists is None else task.recipe.specialists.distill.text_weight
    nothing = student.state()
    units = []
    with bars.track("gains of blocks", len(specialists)) as advance:
        for name in specialists:
            column = losses.of([name]).loss[:, 0] - losses.of(["generalist"]).loss[:, 0]
            label = name.removeprefix("for-")
            mine = np.flatnonzero(np.asarray(samples.domain) == label)
            if not len(mine):  # clusters: the windows on which it is best
                mine = np.argsort(column)
            rows = sorted(mine[:_GAIN_WINDOWS].tolist())
            tokens = samples.select(rows).tokens
            targets = replace(Targets.of(decoder, tokens, dtype), text_weight=weight)
            state = _state(student, folder / "experts" / name)
            every = torch.arange(len(rows))
            gains = block_gains(student, targets, tokens, every, nothing, state, decoder.block_names)
            files = sorted((folder / "experts" / name).glob("scales-*"))
            units += [Unit(name, k, files[k].stat().st_size, gain) for k, gain in enumerate(gains)]
            advance(1)
    return units


def _state(student: Student, folder: Path) -> dict[str, Tensor]:
    """A specialist as a state of the generalist's student: the logarithms of their scales' ratios."""
    files, state = open_expert(folder), {}
    for name, linear in student.linears.items():
        value = files.load(name)
        assert isinstance(value, IntegerTensor)
        state[f"{name}.log_scale"] = (value.scale.float() / linear.scale).log()
    return state


def _mixed(folder: Path, name: str, own: set[int]) -> Path:
    """A folder of links: the specialist's scales in the blocks `own`, the generalist's in the others."""
    source, general, place = folder / "experts" / name, folder / "experts" / "generalist", folder / "mixed" / name
    place.mkdir(parents=True, exist_ok=True)
    scales = sorted(path.name for path in source.glob("scales-*"))
    for path in source.iterdir():
        keep = path.name not in scales or scales.index(path.name) in own
        link(path if keep else general / path.name, place / path.name)
    return place


def _bytes(places: Sequence[Path]) -> int:
    """Bytes of the weights in some folders, linked files once."""
    files = (path.stat() for place in places for path in place.glob("*.safetensors"))
    return sum({entry.st_ino: entry.st_size for entry in files}.values())
