"""The recipe: one YAML file that says everything about a mixture.

It is the only place where an option is declared. Units are in the names. Its canonical hash is printed on whatever is
made from it; two recipes with the same hash make the same bytes.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field, PrivateAttr, ValidationError, model_validator

from moqe.errors import RecipeError, did_you_mean
from moqe.method_options import Awq, Brecq, Distill, DsConv, Gptq, N2uq, Ptq, Qat, Rtn, SmoothQuant
from moqe.options import Options
from moqe.store import canonical_hash

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
RESERVED_NAMES = frozenset(
    {
        "base",
        "mixture",
        "oracle",
        "random",
        "uniform",
        "constant",
        "paper",
        "tuned",
        "linear",
        "knn",
        "logistic",
        "unguarded",
        "cascade",
        "probe",
        "domain",
        "moqe",
    }
)


class Source(Options):
    """Where documents come from: a file or folder of texts or images, a hub id, or `bundled:<name>`.

    `domain` labels every document of a text source in tables and plots; the label of an image is its class. `split` and
    `subset` apply to hub ids, `column` to all that has columns (empty: `text`, or the first of `image` and `img`), and
    `label_column` to images. `separator` cuts text into documents: `blank` at blank lines, `wikitext` at top-level
    headings, `none` not at all; rows of files and hub ids are joined before. `skip_documents` and `max_documents` take
    a range of documents, which are images where the task is about images.
    """

    path: str
    domain: str = ""
    column: str = ""
    label_column: str = "label"
    subset: str = ""
    split: str = "train"
    separator: Literal["none", "blank", "wikitext"] = "none"
    skip_documents: int = Field(0, ge=0)
    max_documents: int | None = Field(None, ge=1)

    @property
    def label(self) -> str:
        """The domain, or the path where none was given."""
        return self.domain or self.path

    @property
    def text_column(self) -> str:
        """The column that holds a document's text."""
        return self.column or "text"


def _as_source(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


Sources = Annotated[tuple[Annotated[Source, BeforeValidator(_as_source)], ...], Field(min_length=1)]


class Preprocessing(Options):
    """What is done to an image, for a base model whose checkpoint does not say.

    `resize`: the shorter edge, pixels; None leaves the image as it is. `crop`: the side of the square cut from the
    centre, pixels; None takes all. `mean` and `std`: per channel, of values between 0 and 1.
    """

    resize: int | None = Field(None, ge=1)
    crop: int | None = Field(None, ge=1)
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bilinear"


class Data(Options):
    """The three kinds of documents, which must be disjoint, and how they become samples.

    `window` is in tokens. The sample limits are windows or images in total, spread evenly over domains or classes; None
    takes all. `validation_share` is the share of the router's documents kept apart for early stopping and selection.
    `preprocessing` is for image models whose checkpoint states none.
    """

    calibration: Sources
    router: Sources
    test: Sources
    window: int = Field(512, ge=16)
    calibration_samples: int | None = Field(128, ge=1)
    router_samples: int | None = Field(None, ge=1)
    test_samples: int | None = Field(None, ge=1)
    validation_share: float = Field(0.25, gt=0.0, lt=1.0)
    preprocessing: Preprocessing | None = None


class Expert(Options):
    """One expert: a method and a scheme applied to the base model, or an existing `checkpoint`.

    `calibration` weighs the calibration domains in the statistics (a missing domain counts 1); empty weighs all alike.
    `on_unsupported` says what happens to a layer that the method cannot do; `block_fallback` names the block scheme
    for rows that the block scheme's super-blocks do not fit. `distill` trains the scales end to end afterwards.
    `codes_of` names the expert whose integer codes this one takes over instead of making its own: what distinguishes it
    is how its scales are distilled. `base` and `weights` make an image expert of another full-precision model with the
    same labels.
    """

    name: Name
    method: str = ""
    scheme: str = ""
    group_size: int | None = Field(None, ge=0)
    symmetric: bool | None = None
    checkpoint: str = ""
    codes_of: str = ""
    base: str = ""
    weights: str = ""
    calibration: dict[str, float] = Field(default_factory=dict)
    sequential: bool = False
    on_unsupported: Literal["error", "rtn", "keep"] = "error"
    block_fallback: str = ""
    gptq: Gptq = Gptq()
    awq: Awq = Awq()
    smoothquant: SmoothQuant = SmoothQuant()
    rtn: Rtn = Rtn()
    ptq: Ptq = Ptq()
    qat: Qat = Qat()
    brecq: Brecq = Brecq()
    n2uq: N2uq = N2uq()
    dsconv: DsConv = DsConv()
    distill: Distill | None = None

    @model_validator(mode="after")
    def _one_origin(self) -> Expert:
        if self.name in RESERVED_NAMES:
            raise ValueError(f"expert name {self.name!r} is reserved: choose another")
        if self.codes_of:
            if without_effect := self.model_fields_set - {"name", "codes_of", "distill"}:
                surplus = ", ".join(sorted(without_effect))
                raise ValueError(f"expert {self.name!r} has the codes of {self.codes_of!r}: remove {surplus}")
            if self.distill is None:
                raise ValueError(
                    f"expert {self.name!r} has the codes of {self.codes_of!r} and no distill: it would be equal"
                )
            return self
        if bool(self.checkpoint) == bool(self.method):
            raise ValueError(f"expert {self.name!r} needs either method and scheme, or checkpoint, or codes_of")
        if self.checkpoint and (without_effect := self.model_fields_set - {"name", "checkpoint"}):
            raise ValueError(
                f"expert {self.name!r} is a checkpoint, taken as it is: remove {', '.join(without_effect)}"
            )
        if self.method and not self.scheme:
            raise ValueError(f"expert {self.name!r} needs a scheme, for example w4a16")
        if any(weight < 0 for weight in self.calibration.values()):
            raise ValueError(f"expert {self.name!r}: calibration weights must not be negative")
        return self


GENERALIST = "generalist"
OWN_WEIGHT = 8.0


class Specialists(Options):
    """Experts made for the inputs they will get: a generalist, and specialists that weigh one domain or cluster more.

    `by: domain` makes one per calibration domain, named after it; `by: cluster` makes `count`, for the clusters that
    k-means finds in the calibration windows' mean embeddings, and needs no labels. `share: codes`: all have the
    generalist's integer codes and differ in distilled scales, which takes a few percent of an expert each. `share:
    none`: each has codes of its own, from statistics that weigh its domain `own_weight` times. `own_weight` is also how
    much oftener distillation sees the specialist's own windows; None tries 4, 8 and 16 and keeps, for each specialist,
    what its domain's validation windows like best. `rounds` of alternation: give every calibration window to the expert
    that serves it best, distill again on these, and stop when validation does not improve. `memory` bounds the bytes of
    all together, in multiples of one expert's: blocks keep scales of their own where held-out windows gain most per
    byte. The generalist is distilled just as long on everything, and is what the guard falls back to.
    """

    count: int | None = Field(None, ge=2)
    by: Literal["domain", "cluster"] = "domain"
    method: str = "gptq"
    scheme: str = "w4a16"
    group_size: int | None = Field(64, ge=0)
    symmetric: bool | None = None
    share: Literal["codes", "none"] = "codes"
    own_weight: float | None = Field(OWN_WEIGHT, gt=1.0)
    rounds: int = Field(0, ge=0)
    memory: float | None = Field(None, ge=1.0)
    distill: Distill = Distill()

    def labels(self, sources: Sources) -> tuple[str, ...]:
        """What the calibration windows are told apart by. Raises ValueError where that does not work out."""
        if self.by == "cluster":
            if self.count is None:
                raise ValueError("specialists.count is missing: by cluster needs to know how many")
            return tuple(f"cluster-{number + 1}" for number in range(self.count))
        domains = tuple(dict.fromkeys(source.label for source in sources))
        if len(domains) < 2:
            raise ValueError(
                "specialists by domain need calibration sources of two domains: give `domain`, or by: cluster"
            )
        if self.count not in (None, len(domains)):
            raise ValueError(
                f"specialists.count is {self.count} and calibration has {len(domains)} domains: leave count out, or "
                "choose by: cluster"
            )
        return domains

    def experts(self, labels: tuple[str, ...]) -> tuple[Expert, ...]:
        """The generalist and one specialist per label, as a recipe could have listed them. Raises ValueError."""
        if self.share == "none" and self.distill.branch_after:
            raise ValueError("specialists.distill.branch_after needs share: codes: other codes have no common start")
        if self.share == "none" and self.memory is not None:
            raise ValueError("specialists.memory needs share: codes: only scales can be left out")
        made: dict[str, Any] = {
            "method": self.method,
            "scheme": self.scheme,
            "group_size": self.group_size,
            "symmetric": self.symmetric,
        }
        whole = self.distill.model_copy(update={"branch_after": 0})
        generalist = Expert(name=GENERALIST, distill=whole, **made)
        found = [generalist]
        for label in labels:
            distill = self.distill.model_copy(update={"weights": {label: self.own_weight}})
            weighed = made | {"calibration": {label: self.own_weight or OWN_WEIGHT}}
            own: dict[str, Any] = {"codes_of": GENERALIST} if self.share == "codes" else weighed
            found.append(Expert(name=specialist_name(label), distill=distill, **own))
        return tuple(found)


def specialist_name(label: str) -> str:
    """The expert's name for a domain's label, which may be a path."""
    return "for-" + (re.sub(r"[^A-Za-z0-9._-]+", "-", label).strip("-._") or "domain")[-56:]


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
    """

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


class Protocol(Options):
    """Which losses decide. `route_on` is the protocol whose verdict comes first; both are always reported."""

    route_on: Literal["whole", "prefix"] = "prefix"
    prefix: int = Field(64, ge=1)


# What only one task reads, by section; anybody else's recipe that states it is refused.
ONLY: dict[str, dict[type[Options], frozenset[str]]] = {
    "language": {
        Source: frozenset({"domain", "separator"}),
        Data: frozenset({"window"}),
        Expert: frozenset({"checkpoint", "calibration", "sequential", "on_unsupported", "block_fallback"})
        | {"group_size", "symmetric", "gptq", "awq", "smoothquant", "rtn", "codes_of", "distill"},
        Router: frozenset({"layers", "heads", "dropout", "max_tokens"}),
    },
    "image-classification": {
        Source: frozenset({"label_column"}),
        Data: frozenset({"preprocessing"}),
        Expert: frozenset({"base", "weights"}) | {"ptq", "qat", "brecq", "n2uq", "dsconv"},
        Router: frozenset({"feature", "loss", "max_cost"}),
    },
}


class Recipe(Options):
    """Everything about a mixture. See the class of each section for its options.

    `weights`: a state dict for a base that is `package.module:factory` or `timm:<name>`. `runtime`: what computes the
    losses; `onnx` is for images, `bfloat16` (the reference with products in that type) for texts.
    """

    base: str
    weights: str = ""
    task: Literal["language", "image-classification"] = "language"
    runtime: Literal["reference", "bfloat16", "onnx"] = "reference"
    data: Data
    experts: tuple[Expert, ...] = ()
    specialists: Specialists | None = None
    router: Router = Router()
    protocol: Protocol = Protocol()
    seed: int = Field(0, ge=0)
    bootstrap_samples: int = Field(2000, ge=100)
    _listed: int = PrivateAttr(0)  # how many experts were listed; those of `specialists` follow

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        self._expand()
        names = [expert.name.lower() for expert in self.experts]  # some file systems do not tell cases apart
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"expert names must differ, and {', '.join(twice)} stands twice")
        self._refuse_other_tasks_keys()
        if self.runtime == {"language": "onnx", "image-classification": "bfloat16"}[self.task]:
            raise ValueError(f"runtime {self.runtime} does not exist where task is {self.task}: remove it")
        if self.task == "language" and self.protocol.prefix >= self.data.window:
            raise ValueError(
                f"protocol.prefix ({self.protocol.prefix}) must be shorter than data.window ({self.data.window})"
            )
        self._refuse_other_tasks_policy()
        return self

    def _expand(self) -> None:
        """Add the experts that `specialists` stands for, and complete those that have another's codes."""
        listed = self.experts
        if self.specialists is not None:
            listed += self.specialists.experts(self.specialists.labels(self.data.calibration))
        if not listed:
            raise ValueError("there are no experts: list some, or describe specialists")
        by_name = {expert.name: expert for expert in listed}
        self._listed = len(self.experts)
        object.__setattr__(self, "experts", tuple(_with_codes(expert, by_name) for expert in listed))

    @property
    def generalist(self) -> str | None:
        """The expert that inputs of an unknown kind get; None where there are no specialists."""
        return GENERALIST if self.specialists is not None else None

    def to_mapping(self) -> dict[str, Any]:
        """The recipe as it could be written, defaults left out."""
        content = self.model_dump(mode="json", exclude_defaults=True)
        listed = content.pop("experts")[: self._listed]
        for expert in listed:
            if expert.get("codes_of"):
                for key in set(expert) - {"name", "codes_of", "distill"}:
                    del expert[key]
        return content | ({"experts": listed} if listed else {})

    def _refuse_other_tasks_policy(self) -> None:
        """Raise ValueError for a policy that this task has not, or that the protocol gives nothing to work on."""
        policy, images = self.router.policy, self.task == "image-classification"
        if policy == "cascade" and not images:
            raise ValueError("router.policy cascade averages class probabilities, of images: choose route or probe")
        if policy == "probe" and images:
            raise ValueError("router.policy probe scores the first tokens of texts: choose route or cascade")
        if policy == "probe" and (self.protocol.route_on != "prefix" or self.protocol.prefix < 2):
            raise ValueError(
                "router.policy probe scores the prefix: set protocol.route_on to prefix and protocol.prefix to 2 or more"
            )

    def _refuse_other_tasks_keys(self) -> None:
        """Raise ValueError for a stated key that this task does not read."""
        own = {"language": {"protocol", "specialists"}, "image-classification": {"weights"}}
        foreign = [
            key for task, keys in own.items() if task != self.task for key in sorted(keys & self.model_fields_set)
        ]
        sections: list[Options] = [*self.data.calibration, *self.data.router, *self.data.test, self.data]
        for section in (*sections, *self.experts, self.router):
            for task, keys in ONLY.items():
                if task != self.task:
                    foreign += sorted(keys.get(type(section), frozenset()) & section.model_fields_set)
        if foreign:
            raise ValueError(f"{', '.join(dict.fromkeys(foreign))} has no effect where task is {self.task}: remove it")

    @property
    def hash(self) -> str:
        """16 hexadecimal digits that name this recipe; defaults count, comments and key order do not."""
        return canonical_hash(self.model_dump(mode="json"))


def _with_codes(expert: Expert, by_name: dict[str, Expert]) -> Expert:
    """An expert with `codes_of` gets the method and number format of the expert it names. Raises ValueError."""
    if not expert.codes_of:
        if expert.distill is not None and expert.distill.branch_after:
            raise ValueError(f"expert {expert.name!r}: distill.branch_after needs codes_of")
        return expert
    owner = by_name.get(expert.codes_of)
    if owner is None:
        raise ValueError(f"expert {expert.name!r}: codes_of: {did_you_mean(expert.codes_of, by_name)}")
    if owner.codes_of or not owner.method:
        raise ValueError(
            f"expert {expert.name!r}: {owner.name!r} has no codes of its own: name an expert with a method"
        )
    return owner.model_copy(update={"name": expert.name, "codes_of": expert.codes_of, "distill": expert.distill})


def parse_recipe(content: object, origin: str = "recipe") -> Recipe:
    """Build a recipe from the mapping a YAML file holds.

    Raises RecipeError: one line per problem, with the closest known key where a key is unknown.
    """
    if not isinstance(content, dict):
        raise RecipeError(f"{origin}: a recipe is a mapping with the keys {', '.join(Recipe.model_fields)}")
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        problems = error.errors()
        unknown = [problem for problem in problems if problem["type"] == "extra_forbidden"]
        raise RecipeError("; ".join(_explain(origin, problem) for problem in unknown or problems)) from None


def load_recipe(path: Path | str) -> Recipe:
    """Read a recipe file. Raises RecipeError when it is missing, not YAML, or not a recipe."""
    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"{path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    return parse_recipe(content, str(path))


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML, without the options left at their defaults."""
    return yaml.safe_dump(recipe.to_mapping(), sort_keys=False, allow_unicode=True)


def _explain(origin: str, problem: Any) -> str:
    location = [str(part) for part in problem["loc"]]
    where = ".".join(location) or "top level"
    if problem["type"] == "extra_forbidden":
        known = _keys_beside(location)
        return f"{origin}: unknown key {where!r}; {did_you_mean(location[-1], known)}"
    if problem["type"] == "missing":
        return f"{origin}: {where!r} is missing"
    message = str(problem["msg"]).removeprefix("Value error, ")
    return f"{origin}: {where}: {message}"


def _keys_beside(location: list[str]) -> list[str]:
    """The keys that the section holding `location`'s last part knows."""
    section: Any = Recipe
    for part in location[:-1]:
        if part.isdigit() or not hasattr(section, "model_fields"):
            continue
        section = _section_of(section.model_fields[part].annotation)
    return list(section.model_fields)


def _section_of(annotation: Any) -> Any:
    """The options class inside an annotation such as `tuple[Expert, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, Options):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        found = _section_of(inner)
        if found is not None:
            return found
    return None
