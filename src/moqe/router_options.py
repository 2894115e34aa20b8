"""Options of a recipe's `router` and `protocol`: how an expert is chosen, and on which losses that is judged."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from moqe.options import Options


class Balance(Options):
    """The paper's balance mechanisms. `usage_decay` is the EMA's; the bias lowers logits of experts used above 1/N."""

    load_balancing_weight: float = Field(0.01, ge=0.0)
    usage_decay: float = Field(0.8, ge=0.0, lt=1.0)
    bias_strength: float = Field(0.8, ge=0.0)
    noise_scale: float = Field(1.0, ge=0.0)
    temperature: float = Field(1.0, gt=0.0)


Policy = Literal["route", "cascade", "probe"]


class Router(Options):
    """How the router is trained. None means: what the preset says.

    `preset: paper` is the paper's network and hyperparameters; `tuned` tries a small set and keeps what measures best
    on validation. What a recipe sets replaces both presets' values; the verdict's line `paper` is the paper's router
    where the recipe sets nothing but the preset. `guard` falls back to the best single expert, among specialists to the
    generalist, unless the predicted gain clears its standard error. `novelty`: among specialists, inputs that lie
    farther from the training samples than this share of the validation documents get the generalist; None routes all.

    `policy` is what is done with predictions: `route` asks the expert with the lowest one. Texts: `probe` lets every
    expert score the first `protocol.prefix` tokens instead, and the best of them go on. Images: `cascade` asks a second
    expert where the first is unsure, as long as the mean cost, in forward passes of an expert per image, stays within
    `max_cost`; `feature` is what the router sees, the base model's first stage, pooled, or the penultimate features of
    the recipe's first expert; `loss` is what it is trained on.

    `precision` is of the products of a text's networks in training, `auto` is bfloat16 where the processor has it.
    """

    LATER: ClassVar[frozenset[str]] = frozenset({"precision"})

    preset: Literal["paper", "tuned"] = "tuned"
    objective: Literal["cross_entropy", "expected_loss", "centred_regression"] | None = None
    epochs: int | None = Field(None, ge=1)
    batch_size: int | None = Field(None, ge=1)
    accumulation: int | None = Field(None, ge=1)
    learning_rate: float | None = Field(None, gt=0.0)
    weight_decay: float | None = Field(None, ge=0.0)
    layers: int | None = Field(None, ge=1)
    heads: int | None = Field(None, ge=1)
    dropout: float | None = Field(None, ge=0.0, lt=1.0)
    balance: Balance = Balance()
    guard: bool = True
    novelty: float | None = Field(0.99, gt=0.0, lt=1.0)
    max_tokens: int = Field(512, ge=1)
    feature: Literal["stem", "backbone"] = "stem"
    loss: Literal["cross_entropy", "zero_one"] = "cross_entropy"
    policy: Policy = "route"
    max_cost: float = Field(1.1, ge=1.0, le=2.0)
    precision: Literal["auto", "float32", "bfloat16"] | None = None


class Protocol(Options):
    """Which losses decide. `route_on` is the protocol whose verdict comes first; both are always reported."""

    route_on: Literal["whole", "prefix"] = "prefix"
    prefix: int = Field(64, ge=1)
