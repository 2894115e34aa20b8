"""The recipe: one YAML file that says everything about a mixture.

It is the only place where an option is declared: the sections are in `data_options`, `expert_options`, `method_options`
and `router_options`. Units are in the names. Its canonical hash is printed on whatever is made from it; two recipes
with the same hash make the same bytes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, PrivateAttr, ValidationError, model_validator

from moqe.data_options import Data, Preprocessing, Source, Sources
from moqe.errors import RecipeError, did_you_mean
from moqe.expert_options import GENERALIST, OWN_WEIGHT, RESERVED_NAMES, Expert, Specialists, specialist_name
from moqe.method_options import Awq, Brecq, Distill, DsConv, Gptq, N2uq, Ptq, Qat, Rtn, SmoothQuant
from moqe.options import Options
from moqe.router_options import Balance, Policy, Protocol, Router
from moqe.store import canonical_hash

__all__ = [
    "GENERALIST",
    "ONLY",
    "OWN_WEIGHT",
    "RESERVED_NAMES",
    "Awq",
    "Balance",
    "Brecq",
    "Data",
    "Distill",
    "DsConv",
    "Expert",
    "Gptq",
    "N2uq",
    "Options",
    "Policy",
    "Preprocessing",
    "Protocol",
    "Ptq",
    "Qat",
    "Recipe",
    "Router",
    "Rtn",
    "SmoothQuant",
    "Source",
    "Sources",
    "Specialists",
    "dump_recipe",
    "load_recipe",
    "parse_recipe",
    "specialist_name",
]

# What only one task reads, by section; anybody else's recipe that states it is refused.
ONLY: dict[str, dict[type[Options], frozenset[str]]] = {
    "language": {
        Source: frozenset({"domain", "separator"}),
        Data: frozenset({"window", "calibration_precision"}),
        Expert: frozenset({"checkpoint", "calibration", "sequential", "on_unsupported", "block_fallback"})
        | {"group_size", "symmetric", "scale_bits", "gptq", "awq", "smoothquant", "rtn", "codes_of", "distill"},
        Router: frozenset({"layers", "heads", "dropout", "max_tokens", "precision"}),
        Specialists: frozenset({"group_size", "symmetric", "memory", "distill"}),
    },
    "image-classification": {
        Source: frozenset({"label_column"}),
        Data: frozenset({"preprocessing"}),
        Expert: frozenset({"base", "weights"}) | {"ptq", "qat", "brecq", "n2uq", "dsconv"},
        Router: frozenset({"feature", "loss", "max_cost"}),
        Specialists: frozenset({"qat", "brecq"}),
    },
}


class Recipe(Options):
    """Everything about a mixture. See the class of each section for its options.

    `weights`: a state dict for a base that is `package.module:factory` or `timm:<name>`. `runtime`: what computes the
    losses; `onnx` is for images, `bfloat16` (the reference with products in that type), `packed`, `packed-float32` and
    `packed-compiled` (low-bit kernels) and `llama.cpp` for texts.
    """

    base: str
    weights: str = ""
    task: Literal["language", "image-classification"] = "language"
    runtime: Literal["reference", "bfloat16", "packed", "packed-float32", "packed-compiled", "llama.cpp", "onnx"] = (
        "reference"
    )
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
        if self.runtime != "reference" and (self.runtime == "onnx") != (self.task == "image-classification"):
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
        if self.specialists is not None and self.task == "language":
            listed += self.specialists.experts(self.specialists.labels(self.data.calibration))
        elif self.specialists is not None:
            listed += self.specialists.image_experts()
        if not listed:
            raise ValueError("there are no experts: list some, or describe specialists")
        by_name = {expert.name: expert for expert in listed}
        self._listed = len(self.experts)
        object.__setattr__(self, "experts", tuple(_with_codes(expert, by_name) for expert in listed))

    @property
    def generalist(self) -> str | None:
        """The expert that inputs of an unknown kind get; None where there are no specialists."""
        return GENERALIST if self.specialists is not None else None

    @property
    def calibration_windows(self) -> int | None:
        """Windows of calibration text to read: those for the statistics, or more where distillation asks; None: all."""
        limit = self.data.calibration_samples
        asked = [expert.distill.samples or 0 for expert in self.experts if expert.distill is not None]
        return None if limit is None else max(limit, *asked, 0)

    @property
    def family(self) -> tuple[Expert, ...]:
        """The experts that `specialists` stands for, the generalist first."""
        return self.experts[self._listed :]

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
                "router.policy probe scores the prefix: set protocol.route_on to prefix, and "
                "protocol.prefix to 2 or more"
            )

    def _refuse_other_tasks_keys(self) -> None:
        """Raise ValueError for a stated key that this task does not read."""
        own = {"language": {"protocol"}, "image-classification": {"weights"}}
        foreign = [
            key for task, keys in own.items() if task != self.task for key in sorted(keys & self.model_fields_set)
        ]
        sections: list[Options] = [*self.data.calibration, *self.data.router, *self.data.test, self.data]
        family = [] if self.specialists is None else [self.specialists]
        for section in (*sections, *self.experts[: self._listed], *family, self.router):
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
    if expert.distill is not None and expert.distill.branch_after:
        reached = 0 if owner.distill is None else owner.distill.steps
        if expert.distill.branch_after > reached:
            raise ValueError(
                f"expert {expert.name!r}: distill.branch_after is {expert.distill.branch_after}, and {owner.name!r} is "
                f"distilled for {reached} steps: lower it, or give {owner.name!r} more steps"
            )
        if owner.distill is not None and None in owner.distill.weights.values():
            raise ValueError(
                f"expert {expert.name!r}: distill.branch_after needs one training to branch from, and {owner.name!r} "
                "tries several weights: state them"
            )
    if expert.distill is not None and owner.distill is not None and expert.distill.norms != owner.distill.norms:
        raise ValueError(
            f"expert {expert.name!r}: distill.norms must be as for {owner.name!r}, whose codes it has: those who share "
            "codes are trained on one model"
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
