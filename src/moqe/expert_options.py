"""Options of a recipe's experts, one by one (`experts`) or as a family of specialists (`specialists`)."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from moqe.data_options import Sources
from moqe.errors import did_you_mean
from moqe.method_options import Awq, Brecq, Distill, DsConv, Gptq, N2uq, Ptq, Qat, Rtn, SmoothQuant
from moqe.options import Options
from moqe.schemes import SCHEMES

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


class Expert(Options):
    """One expert: a method and a scheme applied to the base model, or an existing `checkpoint`.

    `calibration` weighs the calibration domains in the statistics (a missing domain counts 1); empty weighs all alike.
    `on_unsupported` says what happens to a layer that the method cannot do; `block_fallback` names the block scheme
    for rows that the block scheme's super-blocks do not fit. `scale_bits: 32` stores an integer scheme's scales in
    float32, at 16 more bits a group. `distill` trains the scales end to end afterwards.
    `codes_of` names the expert whose integer codes this one takes over instead of making its own: what distinguishes it
    is how its scales are distilled. `base` and `weights` make an image expert of another full-precision model with the
    same labels.
    """

    LATER: ClassVar[frozenset[str]] = frozenset({"scale_bits"})

    name: Name
    method: str = ""
    scheme: str = ""
    group_size: int | None = Field(None, ge=0)
    symmetric: bool | None = None
    scale_bits: Literal[16, 32] | None = None
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
OWN_WEIGHTS = (4.0, 8.0, 16.0)  # what is tried where a recipe leaves own_weight open
IMAGE_METHODS = ("qat", "brecq")  # whose result depends on which images they see most


class Specialists(Options):
    """Experts made for the inputs they will get: a generalist, and specialists that weigh one domain or cluster more.

    `by: domain` makes one per calibration domain, named after it, or for those in `domains`; the others' inputs are the
    generalist's, unless the router finds a specialist that serves them better. `by: cluster` makes `count`, for the
    clusters that k-means finds in the calibration windows' mean embeddings, and needs no labels. `share: codes`: all
    have the generalist's integer codes and differ in distilled scales, which takes a few percent of an expert each.
    `share: none`: each has codes of its own, from statistics that weigh its domain `own_weight` times. `own_weight` is
    also how much oftener distillation sees the specialist's own windows; None tries 4, 8 and 16 and keeps, for each
    specialist, what its domain's validation windows like best. `rounds` of alternation: give every calibration window
    to the expert that serves it best, distill again on these, and stop when validation does not improve. `memory`
    bounds the bytes of all together, in multiples of one expert's: blocks keep scales of their own where held-out
    windows gain most per byte. The generalist is distilled just as long on everything, and is what the guard falls back
    to.

    Of images specialists are made by `qat` or `brecq`, with the options of that section, by cluster of the router's
    features. They see their own images `own_weight` times as often; nothing is distilled. `share: codes` trains scales,
    biases and the steps of activations on top of one set of codes.
    """

    LATER: ClassVar[frozenset[str]] = frozenset({"domains", *IMAGE_METHODS})

    count: int | None = Field(None, ge=2)
    by: Literal["domain", "cluster"] = "domain"
    domains: tuple[str, ...] | None = Field(None, min_length=1)
    method: str = "gptq"
    scheme: str = "w4a16"
    group_size: int | None = Field(64, ge=0)
    symmetric: bool | None = None
    share: Literal["codes", "none"] = "codes"
    own_weight: float | None = Field(OWN_WEIGHT, gt=1.0)
    rounds: int = Field(0, ge=0)
    memory: float | None = Field(None, ge=1.0)
    distill: Distill = Distill()
    qat: Qat | None = None
    brecq: Brecq | None = None

    def labels(self, sources: Sources) -> tuple[str, ...]:
        """What the calibration windows are told apart by. Raises ValueError where that does not work out."""
        if self.by == "cluster":
            if self.count is None:
                raise ValueError("specialists.count is missing: by cluster needs to know how many")
            if self.domains is not None:
                raise ValueError("specialists.domains needs by: domain: clusters have no names yet")
            return tuple(f"cluster-{number + 1}" for number in range(self.count))
        domains = tuple(dict.fromkeys(source.label for source in sources))
        if len(domains) < 2:
            raise ValueError(
                "specialists by domain need calibration sources of two domains: give `domain`, or by: cluster"
            )
        for name in self.domains or ():
            if name not in domains:
                raise ValueError(
                    f"specialists.domains: no calibration source of {name!r}; {did_you_mean(name, domains)}"
                )
        chosen = domains if self.domains is None else tuple(name for name in domains if name in self.domains)
        if self.count not in (None, len(chosen)):
            raise ValueError(
                f"specialists.count is {self.count} and there are {len(chosen)} domains to make specialists for: leave "
                "count out, name the domains in specialists.domains, or choose by: cluster"
            )
        return chosen

    def experts(self, labels: tuple[str, ...]) -> tuple[Expert, ...]:
        """The generalist and one specialist per label, as a recipe could have listed them. Raises ValueError."""
        if self.share == "none" and self.distill.branch_after:
            raise ValueError("specialists.distill.branch_after needs share: codes: other codes have no common start")
        if self.share == "none" and self.memory is not None:
            raise ValueError("specialists.memory needs share: codes: only scales can be left out")
        if self.share == "none" and self.rounds:
            raise ValueError("specialists.rounds needs share: codes: rounds train scales on one set of codes")
        if self.memory is not None and self.scheme in SCHEMES and SCHEMES[self.scheme].is_block:
            raise ValueError(
                f"specialists.memory needs scales in files of their own, which {self.scheme} has not: choose an "
                "integer scheme such as w4a16"
            )
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

    def image_experts(self) -> tuple[Expert, ...]:
        """The same for images. Raises ValueError where images have no such specialists."""
        if self.method not in IMAGE_METHODS:
            raise ValueError(f"specialists.method is {self.method!r}: specialists of images are made by qat or brecq")
        if self.by == "domain":
            raise ValueError(
                "specialists.by is domain, and the domain of an image is its class, which is what is asked of an "
                "expert: choose by: cluster, and count"
            )
        for section in set(IMAGE_METHODS) - {self.method}:
            if getattr(self, section) is not None:
                raise ValueError(f"specialists.{section} has no effect where specialists.method is {self.method}")
        options = getattr(self, self.method)
        made = {} if options is None else {self.method: options}
        generalist = Expert(name=GENERALIST, method=self.method, scheme=self.scheme, **made)
        codes = {"codes_of": GENERALIST} if self.share == "codes" else {}
        names = [specialist_name(label) for label in self.labels(())]
        return generalist, *(generalist.model_copy(update={"name": name, **codes}) for name in names)


def specialist_name(label: str) -> str:
    """The expert's name for a domain's label, which may be a path."""
    return "for-" + (re.sub(r"[^A-Za-z0-9._-]+", "-", label).strip("-._") or "domain")[-56:]
