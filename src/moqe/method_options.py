"""Options of the quantization methods, as a recipe's experts state them. A section that a method lacks is refused."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from moqe.options import Options


class Gptq(Options):
    """Options of gptq. `damping` is relative to the mean of H's diagonal; `block_columns` only changes speed."""

    damping: float = Field(0.01, gt=0.0)
    activation_order: bool = True
    block_columns: int = Field(128, ge=1)
    grid: Literal["searched", "minmax"] = "searched"


class Awq(Options):
    """Options of awq: points of the scale search over exponents in [0, 1), and the clipping search."""

    grid_points: int = Field(20, ge=2)
    clip: bool = True
    clip_steps: int = Field(10, ge=1)
    max_shrink: float = Field(0.5, gt=0.0, lt=1.0)


class SmoothQuant(Options):
    """Options of smoothquant: the migration strength alpha of the paper's section 4."""

    alpha: float = Field(0.5, ge=0.0, le=1.0)


class Rtn(Options):
    """Options of rtn. `grid: searched` minimises the squared rounding error, `minmax` spans the extremes."""

    grid: Literal["searched", "minmax"] = "minmax"


class Distill(Options):
    """Options of distillation, a step after any method: scales trained end to end, codes fixed.

    `steps` are updates of `batch_windows` calibration windows each. `weights` multiply how often a domain's windows are
    seen: a missing domain counts 1, null is chosen on validation. `norms` trains norm weights too, at a tenth of the
    rate. `branch_after`: an expert with `codes_of` begins with what that expert had after so many of its steps. A share
    of the calibration documents, `validation_share`, only decides which state is kept. `samples`: windows of
    calibration text, where they should be more than the statistics see (`data.calibration_samples`); None takes the
    same. `text_weight`: the share of the target that is the calibration text itself; 0 follows the base alone.
    `precision: auto` multiplies in bfloat16 where the processor has instructions for it.
    """

    LATER: ClassVar[frozenset[str]] = frozenset({"text_weight"})

    steps: int = Field(120, ge=1)
    batch_windows: int = Field(2, ge=1)
    learning_rate: float = Field(0.0015, gt=0.0)
    weights: dict[str, float | None] = Field(default_factory=dict)
    norms: bool = False
    branch_after: int = Field(0, ge=0)
    evaluate_every: int = Field(24, ge=1)
    validation_share: float = Field(0.1, gt=0.0, lt=1.0)
    validation_windows: int = Field(24, ge=1)
    samples: int | None = Field(None, ge=2)
    text_weight: float = Field(0.0, ge=0.0, lt=1.0)
    precision: Literal["auto", "float32", "bfloat16"] = "auto"

    @model_validator(mode="after")
    def _consistent(self) -> Distill:
        if any(weight is not None and weight < 0 for weight in self.weights.values()):
            raise ValueError("distill.weights must not be negative")
        if self.branch_after >= self.steps:
            raise ValueError(f"distill.branch_after ({self.branch_after}) must be below steps ({self.steps})")
        return self


class Ptq(Options):
    """Options of ptq. `percentile` of activations that the range keeps; None searches the least squared error."""

    percentile: float | None = Field(None, gt=50.0, le=100.0)


class Qat(Options):
    """Options of qat. `steps` are updates, `learning_rate` is in quantization steps per update.

    `loss: distill` follows the full-precision network's logits at a `temperature`, `labels` the labels of the
    calibration images.
    """

    steps: int = Field(500, ge=1)
    batch_size: int = Field(32, ge=1)
    learning_rate: float = Field(0.004, gt=0.0)
    loss: Literal["distill", "labels"] = "distill"
    temperature: float = Field(4.0, gt=0.0)

    @model_validator(mode="after")
    def _temperature_has_an_effect(self) -> Qat:
        if self.loss == "labels" and "temperature" in self.model_fields_set:
            raise ValueError("temperature has no effect on loss: labels: remove it")
        return self


class Brecq(Options):
    """Options of brecq. `steps` are updates per block; `warmup` is the share of them without the regularizer.

    `learning_rate` is of the roundings, `step_learning_rate` of activation steps relative to themselves.
    `rounding_weight` weighs the regularizer against the block's error, which starts at 1.
    """

    steps: int = Field(400, ge=1)
    batch_size: int = Field(32, ge=1)
    learning_rate: float = Field(0.04, gt=0.0)
    step_learning_rate: float = Field(0.002, ge=0.0)
    rounding_weight: float = Field(2.0, ge=0.0)
    warmup: float = Field(0.2, ge=0.0, lt=1.0)


class N2uq(Options):
    """Options of n2uq: as those of qat; the loss is always distillation.

    `weights: learned` trains their steps, `entropy` is the paper's grid, on which all codes are used equally often.
    """

    weights: Literal["learned", "entropy"] = "learned"
    steps: int = Field(400, ge=1)
    batch_size: int = Field(32, ge=1)
    learning_rate: float = Field(0.004, gt=0.0)
    temperature: float = Field(4.0, gt=0.0)


class DsConv(Options):
    """Options of dsconv. `block` is in input channels; the rest is the adaptation, which `steps: 0` leaves out."""

    block: int = Field(64, ge=2)
    steps: int = Field(200, ge=0)
    batch_size: int = Field(32, ge=1)
    learning_rate: float = Field(0.004, gt=0.0)
    temperature: float = Field(4.0, gt=0.0)

    @model_validator(mode="after")
    def _adaptation_is_on(self) -> DsConv:
        idle = sorted(self.model_fields_set - {"block", "steps"})
        if not self.steps and idle:
            raise ValueError(f"without adaptation (steps: 0) {', '.join(idle)} has no effect: remove it")
        return self
