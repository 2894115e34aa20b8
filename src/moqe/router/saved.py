"""A router on disk: `router.json` says what it is, `router.safetensors` holds its numbers.

No pickle, no embeddings (they are the base model's), and the same router gives the same bytes. The JSON file is written
last and holds the digest of the other, so a pair that does not belong together is noticed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from moqe.errors import CheckpointError, MoqeError, did_you_mean
from moqe.router.baselines import Constant, Random, Uniform
from moqe.router.domain_classifier import DomainClassifier
from moqe.router.guard import GuardedRouter
from moqe.router.knn import Knn
from moqe.router.linear import Linear
from moqe.router.logistic import Logistic
from moqe.router.network_router import NetworkRouter
from moqe.router.novelty import Novelty, NoveltyRouter
from moqe.router.router import Router, SavableRouter
from moqe.store import atomic, digest_bytes, read_json, write_json

FORMAT = 2
DESCRIPTION, TENSORS = "router.json", "router.safetensors"
NOVELTY = "novelty."  # begins the names of what tells novel samples, beside the tensors of the router


ROUTERS: dict[str, type[SavableRouter]] = {
    "constant": Constant,
    "random": Random,
    "uniform": Uniform,
    "linear": Linear,
    "knn": Knn,
    "logistic": Logistic,
    "domain-classifier": DomainClassifier,
    "network": NetworkRouter,
}


def save_router(router: Router, folder: Path) -> None:
    """Write a router into `folder`. Raises CheckpointError for a router of a class that ROUTERS does not list."""
    within = router.router if isinstance(router, GuardedRouter) else router
    inner = within.router if isinstance(within, NoveltyRouter) else within
    if not isinstance(inner, Constant | Random | Uniform | Linear | Knn | Logistic | DomainClassifier | NetworkRouter):
        raise CheckpointError(f"a router of class {type(inner).__name__} cannot be saved; known: {', '.join(ROUTERS)}")
    tensors = inner.tensors()
    if isinstance(within, NoveltyRouter):
        tensors |= {f"{NOVELTY}{name}": tensor for name, tensor in within.novelty.tensors().items()}
    content = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    description: dict[str, Any] = {
        "format": FORMAT,
        "kind": inner.kind,
        "options": inner.options(),
        "guard": None,
        "novelty": None,
        "tensors": digest_bytes(content),
    }
    if isinstance(router, GuardedRouter):
        description["guard"] = {"fallback": router.fallback, "margin": router.margin}
    if isinstance(within, NoveltyRouter):
        description["novelty"] = {"fallback": within.fallback, **within.novelty.options()}
    with atomic(folder / TENSORS) as partial:
        partial.write_bytes(content)
    write_json(folder / DESCRIPTION, description)


def read_router(folder: Path) -> tuple[Any, bytes]:
    """The description and the tensors' file of the router in `folder`, which belong together.

    Raises CheckpointError when files are missing, damaged or of two different routers.
    """
    description = read_json(folder / DESCRIPTION)
    try:
        content = (folder / TENSORS).read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{folder / TENSORS} does not exist: build the router again") from None
    try:
        if description["format"] != FORMAT:
            raise CheckpointError(f"{folder / DESCRIPTION} has format {description['format']}, and {FORMAT} is known")
        if digest_bytes(content) != description["tensors"]:
            raise CheckpointError(f"{folder / TENSORS} is damaged or of another router: build the router again")
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / DESCRIPTION} does not describe a router: build the router again") from error
    return description, content


def load_router(folder: Path, stored: tuple[Any, bytes] | None = None) -> Router:
    """Read the router in `folder`, on the CPU. stored: what `read_router` found there, where that was called before.

    Raises CheckpointError when files are missing, damaged, of two different routers, or of an unknown kind.
    """
    description, content = read_router(folder) if stored is None else stored
    try:
        kind, saved_guard, saved_novelty = description["kind"], description["guard"], description.get("novelty")
        if kind not in ROUTERS:
            raise CheckpointError(f"{folder / DESCRIPTION}: unknown router {kind!r}; {did_you_mean(kind, ROUTERS)}")
        tensors = load(content)
        router: Router = ROUTERS[kind].restore(description["options"], _outside(tensors))
        if saved_novelty is not None:
            novelty = Novelty.restore(saved_novelty, _inside(tensors))
            router = NoveltyRouter(router, int(saved_novelty["fallback"]), novelty)
        if saved_guard is not None:
            return GuardedRouter(router, int(saved_guard["fallback"]), float(saved_guard["margin"]))
    except MoqeError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{folder / DESCRIPTION} does not describe a router: build the router again") from error
    return router


def _inside(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(NOVELTY): tensor for name, tensor in tensors.items() if name.startswith(NOVELTY)}


def _outside(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(NOVELTY)}
