"""Language models: windows of tokens, experts made block by block, losses in nats per token."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from torch import Tensor, nn

from moqe.data.protocols import (
    WHOLE,
    Scored,
    SplitSamples,
    describe_text,
    prefix_protocol,
    reduce,
    visible_tokens,
)
from moqe.data.samples import TextSamples
from moqe.data.splits import make_splits, tokenizer_digest
from moqe.errors import DataError, RecipeError, did_you_mean
from moqe.folder import MixtureFolder
from moqe.formats import open_expert
from moqe.formats.compressed_tensors import SHARED_TENSORS
from moqe.formats.expert_files import ExpertFiles
from moqe.method_options import Distill
from moqe.methods import METHODS, check
from moqe.methods.distill import distill_seconds
from moqe.models.decoder import Decoder
from moqe.models.device import check_device, product_dtype
from moqe.models.estimate import (
    Estimate,
    Workload,
    estimate,
    expert_block_bytes,
    measure_flops,
    measure_shape,
    scale_block_bytes,
)
from moqe.models.identity import model_digest
from moqe.models.shared import SharedParts, open_shared
from moqe.progress import Progress, Silent
from moqe.recipe import Recipe
from moqe.router.features import TokenFeatures
from moqe.router.router import Router
from moqe.runtimes.runtime import Runtime
from moqe.runtimes.texts import TEXT_RUNTIMES
from moqe.store import disk_bytes, read_json
from moqe.tasks.expert_maker import ExpertMaker
from moqe.tasks.task import ExpertFacts

log = logging.getLogger("moqe")


class LanguageTask:
    """A causal language model and its experts. Satisfies `Task`."""

    metrics: tuple[str, ...] = ("nats_per_token",)
    router_metric = "nats_per_token"
    modality = "text"
    classes: tuple[str, ...] = ()
    feature_expert: str | None = None
    chunk_samples = 16

    def __init__(self, recipe: Recipe, folder: Path, device: str = "cpu") -> None:
        self.recipe, self.folder, self.device = recipe, MixtureFolder(folder), device
        self.runtime_name = recipe.runtime
        self.schemes = {expert.name: check(expert) for expert in recipe.experts if expert.method}
        check_device(device)
        self.decoder = Decoder.open(recipe.base, device=device)
        prefix = prefix_protocol(recipe.protocol.prefix)
        self.protocols: tuple[str, ...] = (prefix, WHOLE) if recipe.protocol.route_on == "prefix" else (WHOLE, prefix)
        self._runtimes: dict[str, Runtime] = {}

    @classmethod
    def predict(cls, recipe: Recipe, device: str, progress: Progress) -> Estimate:
        """What a build would take, from the base model's config."""
        check_device(device)
        schemes = {expert.name: check(expert) for expert in recipe.experts if expert.method}
        decoder = Decoder.dry(recipe.base)
        data = recipe.data
        sizes = [data.calibration_samples, data.router_samples, data.test_samples]
        if None in sizes:
            splits = make_splits(data, decoder.tokenizer, recipe.seed, progress)
            router = len(splits.router_train) + len(splits.router_validation)
            sizes = [len(splits.calibration), router, len(splits.test)]
        calibration, *scored = (size or 0 for size in sizes)
        workload = Workload(
            window=data.window,
            calibration_windows=calibration,
            domains=len({source.label for source in data.calibration}),
            scored_windows=sum(scored),
        )
        rate, shape = measure_flops(device), measure_shape(decoder)
        calibration_rate = measure_flops(device, product_dtype(device, data.calibration_precision))
        found = estimate(shape, recipe.experts, schemes, METHODS, workload, rate, calibration_rate)
        precisions = {expert.distill.precision for expert in recipe.experts if expert.distill is not None}
        seconds = 0.0
        for precision in sorted(precisions):
            dtype = product_dtype(device, precision)
            seconds += distill_seconds(
                [e for e in recipe.experts if e.distill is not None and e.distill.precision == precision],
                recipe.specialists,
                linear_weights=shape.linear_weights,
                head_weights=shape.hidden * shape.vocabulary,
                window=data.window,
                windows=max(calibration, recipe.calibration_windows or 0),
                dtype=dtype,
                device=device,
                flops_per_second=measure_flops(device, dtype),
            )
        return replace(found, seconds={**found.seconds, "distill": seconds}) if precisions else found

    @property
    def metric(self) -> str:
        """The metric that the verdict judges."""
        return self.metrics[0]

    @cached_property
    def _splits(self) -> dict[str, TextSamples]:
        return self._read_splits(Silent())

    def _read_splits(self, progress: Progress) -> dict[str, TextSamples]:
        data = self.recipe.data.model_copy(update={"calibration_samples": self.recipe.calibration_windows})
        splits = make_splits(data, self.decoder.tokenizer, self.recipe.seed, progress)
        specialists, domains = self.recipe.specialists, set(splits.calibration.domain)
        by_cluster = specialists is not None and specialists.by == "cluster"
        known = set(specialists.labels(self.recipe.data.calibration)) if specialists is not None else domains
        for expert in self.recipe.experts:
            distilled = set(expert.distill.weights) if expert.distill is not None else set()
            weighed = set(expert.calibration) | distilled
            if by_cluster and weighed & (domains - known):
                raise RecipeError(
                    f"expert {expert.name!r} weighs the domain {min(weighed & (domains - known))!r}, and with "
                    "specialists.by: cluster windows are told apart by cluster: use by: domain, or two recipes"
                )
            for domain in sorted(weighed - domains - known):
                hint = did_you_mean(domain, domains | known)
                raise RecipeError(f"expert {expert.name!r} weighs the unknown domain {domain!r}; {hint}")
            if expert.distill is not None:
                _refuse_single_documents(expert.name, expert.distill, splits.calibration)
        return {
            "calibration": splits.calibration,
            "router_train": splits.router_train,
            "router_validation": splits.router_validation,
            "test": splits.test,
        }

    def splits(self) -> Mapping[str, TextSamples]:
        """`calibration`, `router_train`, `router_validation` and `test`: disjoint documents."""
        return self._splits

    def describe(self, split: str) -> SplitSamples:
        """What the loss table records about a split beside losses."""
        return describe_text(self._splits[split], self.protocols, self._decode)

    def _decode(self, ids: list[int]) -> str:
        text: str = self.decoder.tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def identity(self, progress: Progress) -> dict[str, str]:
        """Digests of everything that decides the result beside the recipe. Reads the data, and shows that."""
        self._splits = self._read_splits(progress)
        samples = {f"samples.{name}": split.digest for name, split in self._splits.items()}
        return {
            "base": model_digest(self.decoder.folder, progress),
            "tokenizer": tokenizer_digest(self.decoder.tokenizer),
            **samples,
        }

    def disk_bytes_needed(self) -> int:
        """Bytes that are still to be written: missing experts and the work files of the largest, less what is there."""
        shape = measure_shape(self.decoder)
        missing = [name for name in self.schemes if not self.folder.certificate(name).exists()]
        own = {expert.name for expert in self.recipe.experts if not expert.codes_of}
        sizes = [
            (expert_block_bytes if name in own else scale_block_bytes)(shape, self.schemes[name]) for name in missing
        ]
        needed = sum(sizes) + max(sizes, default=0) + shape.other_parameters * shape.stored_bytes
        places = [self.folder.shared, self.folder.work, *(self.folder.expert(name) for name in missing)]
        return max(0, needed - sum(disk_bytes(place) for place in places))

    def make_experts(self, progress: Progress) -> None:
        """Quantize what is not yet on disk."""
        ExpertMaker(self.recipe, self.schemes, self.decoder, self.folder).run(self._splits["calibration"], progress)

    def losses(self, expert: str, split: str, rows: Sequence[int]) -> Scored:
        """Losses of an expert (or `base`) on the samples of a split at `rows`, under every protocol, in nats."""
        token_nats = self._runtime(expert).score(self._splits[split].select(rows).tokens)
        return Scored({protocol: {self.metric: reduce(token_nats, protocol)} for protocol in self.protocols})

    @cached_property
    def _shared(self) -> SharedParts:
        return open_shared(self.folder.shared, self.folder.shared / SHARED_TENSORS, self.device)

    def _runtime(self, expert: str) -> Runtime:
        """What scores an expert; only one set of blocks, the base's or an expert's, is in memory at a time."""
        if expert not in self._runtimes:
            self._runtimes.clear()
            if expert == "base":
                self._runtimes[expert] = self._open(self.decoder.full(), None, expert)
            else:
                files = open_expert(self.folder.expert(expert))
                self._runtimes[expert] = self._open(self._shared.model, files, expert)
        return self._runtimes[expert]

    def _open(self, model: nn.Module, files: ExpertFiles | None, name: str) -> Runtime:
        return TEXT_RUNTIMES[self.runtime_name](model, self.device).open(files, name)

    @cached_property
    def _embedding(self) -> Tensor:
        return self.decoder.embedding()

    def features(self, split: str, protocol: str) -> TokenFeatures:
        """Embeddings of the tokens that the router may see."""
        seen = visible_tokens(protocol) or self.recipe.router.max_tokens
        return TokenFeatures(self._splits[split].tokens[:, :seen], self._embedding, self.device)

    def deploy(self, router: Router, folder: Path) -> None:
        """Nothing: a text router runs from what is saved."""

    def picture(self, split: str, row: int) -> None:
        """Texts have no picture."""

    def facts(self) -> dict[str, ExpertFacts]:
        """Size and certificate of every expert, and the size of `base`."""
        base_bytes = sum(path.stat().st_size for path in self.decoder.folder.glob("*.safetensors"))
        experts = {
            expert.name: ExpertFacts(
                disk_bytes(self.folder.expert(expert.name)), read_json(self.folder.certificate(expert.name))
            )
            for expert in self.recipe.experts
        }
        return {"base": ExpertFacts(base_bytes, {}), **experts}


def _refuse_single_documents(expert: str, options: Distill, calibration: TextSamples) -> None:
    """Raise DataError where nothing could be held out of a domain that a training weighs otherwise than the rest."""
    for label in sorted(options.weights):
        documents = {
            name for name, domain in zip(calibration.document, calibration.domain, strict=True) if domain == label
        }
        if len(documents) == 1 and options.weights[label] != 1.0:
            raise DataError(
                f"expert {expert!r} is distilled for the domain {label!r}, whose calibration text is one document, of "
                "which nothing can be held out to tell when it is best: give more documents, or cut this one with "
                "`separator`"
            )
