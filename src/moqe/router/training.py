"""Training a routing network: batches, accumulation, cosine decay, and the epoch that chooses best on validation.

Source: Zhang et al., MoQE (arXiv 2508.09204), training details. Faithful: Adam with cosine decay of the learning rate,
gradients accumulated over several batches, the balance mechanisms of balance.py. Differs: weight decay is decoupled
(AdamW), because added to the gradient it would swamp losses that differ in the third digit; and after every epoch the
router is judged by what it is for, the mean loss of the experts it chooses on validation, and the best epoch is kept.
Losses are centred per sample and divided by their root mean square over the training set before an objective sees them,
so that one learning rate serves models whose experts differ by a tenth of a nat and by a thousandth.

Determinism: everything random comes from `seed`; the caller's random state is left alone. The same inputs, seed,
machine and number of threads give the same bytes.
Cost: per epoch one forward and backward pass of the network over the training samples; features are made per batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor

from moqe.errors import NumericalError, RecipeError
from moqe.models.device import mixed_precision, product_dtype
from moqe.progress import Advance
from moqe.recipe import Balance
from moqe.router.balance import Gate
from moqe.router.examples import RoutingExamples
from moqe.router.network_router import NetworkRouter
from moqe.router.objectives import OBJECTIVES, Objective
from moqe.router.router import choose, realised_losses
from moqe.router.text_network import RoutingNetwork


@dataclass(frozen=True)
class TrainingOptions:
    """How a network is trained.

    batch_size counts samples in one pass, accumulation the passes in one step of the optimizer. `balance` None trains
    without balance. `patience` stops after so many epochs in a row that were worse than the best; None never stops.
    `precision` is what products are computed in while training, as in `moqe.models.device.product_dtype`.
    """

    objective: str
    epochs: int
    batch_size: int
    accumulation: int
    learning_rate: float
    weight_decay: float
    balance: Balance | None
    patience: int | None = None
    precision: str = "float32"


@dataclass(frozen=True)
class Epoch:
    """Means over one epoch's training batches, and of what judges, over the choices on validation after it."""

    objective: float
    validation_loss: float


def train_network(
    make_network: Callable[[], RoutingNetwork],
    train: RoutingExamples,
    validation: RoutingExamples,
    options: TrainingOptions,
    seed: int,
    name: str,
    epoch_done: Advance | None = None,
) -> tuple[NetworkRouter, tuple[Epoch, ...]]:
    """Train a new network and return the router of its best epoch, the latest of equals, with the history.

    `epoch_done` is told after every epoch.

    Raises RecipeError for a regression with balance, NumericalError when the objective stops being finite.
    """
    device = train.features.batch(torch.zeros(1, dtype=torch.int64)).device
    if options.balance is not None and options.objective == "centred_regression":
        raise RecipeError("router.balance works on gating logits, which centred_regression has not: remove one of them")
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        network = make_network().to(device)
        gate = None if options.balance is None else Gate(train.experts, options.balance).to(device)
        return _train(network, gate, train, validation, options, seed, name, epoch_done)


def _train(
    network: RoutingNetwork,
    gate: Gate | None,
    train: RoutingExamples,
    validation: RoutingExamples,
    options: TrainingOptions,
    seed: int,
    name: str,
    epoch_done: Advance | None,
) -> tuple[NetworkRouter, tuple[Epoch, ...]]:
    order = torch.Generator().manual_seed(seed)
    dtype = product_dtype(str(next(network.parameters()).device), options.precision)
    centred = train.centred
    spread = float(centred.square().mean().sqrt()) or 1.0  # nats; all experts equal: any scale will do
    targets = (centred / spread).float()
    batches = math.ceil(len(train) / options.batch_size)
    steps_per_epoch = math.ceil(batches / options.accumulation)
    parameters = [{"params": list(network.parameters()), "weight_decay": options.weight_decay}]
    if gate is not None:
        parameters.append({"params": list(gate.parameters()), "weight_decay": 0.0})
    optimizer = torch.optim.AdamW(parameters, lr=options.learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, cosine(options.epochs * steps_per_epoch))

    history: list[Epoch] = []
    best, best_loss, since_best = _router(network, gate, options, spread, name), math.inf, 0
    for epoch in range(options.epochs):
        network.train()
        shuffled = torch.randperm(len(train), generator=order)
        total = 0.0
        for step, rows in enumerate(torch.split(shuffled, options.batch_size * options.accumulation)):
            annealing = 1.0 - (epoch * steps_per_epoch + step) / (options.epochs * steps_per_epoch)
            total += _step(network, gate, optimizer, train, targets, rows, annealing, options, dtype)
            schedule.step()
        router = _router(network, gate, options, spread, name)
        loss = float(realised_losses(validation.deciding.double(), choose(router.predict(validation.features))).mean())
        history.append(Epoch(total / len(train), loss))
        if loss <= best_loss:
            best, best_loss, since_best = _frozen(router), loss, 0
        else:
            since_best += 1
        if epoch_done is not None:
            epoch_done(1)
        if options.patience is not None and since_best >= options.patience:
            break
    return best, tuple(history)


def _step(
    network: RoutingNetwork,
    gate: Gate | None,
    optimizer: torch.optim.Optimizer,
    train: RoutingExamples,
    targets: Tensor,
    rows: Tensor,
    annealing: float,
    options: TrainingOptions,
    dtype: torch.dtype,
) -> float:
    """One optimizer step on the samples at `rows`; returns the objective summed over them."""
    objective: Objective = OBJECTIVES[options.objective]
    optimizer.zero_grad()
    total = 0.0
    for part in torch.split(rows, options.batch_size):
        features = train.features.batch(part)
        with mixed_precision(dtype, features.device):
            logits = network(features).float()
        wanted = targets[part.to(targets.device)].to(logits.device)
        gated = logits if gate is None else gate(logits, annealing)
        loss = objective(gated, wanted)
        total += float(loss.detach()) * len(part)
        if gate is not None:
            loss = loss + gate.penalty(gated, annealing)
            gate.observe(gated.detach())
        (loss * (len(part) / len(rows))).backward()  # type: ignore[no-untyped-call]
    if not math.isfinite(total):
        raise NumericalError("the router's training loss is not finite: lower router.learning_rate")
    optimizer.step()
    return total


def cosine(steps: int) -> Callable[[int], float]:
    """The factor on the learning rate at each step: from 1 down to 0 along half a cosine."""
    return lambda step: 0.5 * (1.0 + math.cos(math.pi * min(step, steps) / steps))


def _router(
    network: RoutingNetwork, gate: Gate | None, options: TrainingOptions, spread: float, name: str
) -> NetworkRouter:
    """The network as it stands, as a router that shares its parameters."""
    if gate is not None:
        return NetworkRouter(network, gate.bias.clone(), 1.0 / gate.options.temperature, name, "logit")
    no_bias = torch.zeros(1, device=next(network.parameters()).device)
    if options.objective == "centred_regression":
        return NetworkRouter(network, no_bias, spread, name, "nats")
    return NetworkRouter(network, no_bias, 1.0, name, "logit")


def _frozen(router: NetworkRouter) -> NetworkRouter:
    """A copy that further training does not touch."""
    network = deepcopy(router.network).eval().requires_grad_(False)
    return NetworkRouter(network, router.bias, router.scale, router.name, router.unit)
