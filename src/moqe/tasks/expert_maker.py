"""From calibration windows to expert folders: one pass over the blocks makes all experts of a recipe.

Every block is quantized for all experts while it is in memory, written, and dropped. What is on disk is not made again:
an interrupted run continues with the first block that some expert lacks. An expert with `sequential: true` sees the
inputs that its own quantized prefix produces; it costs a pass of its own.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from moqe.data.samples import TextSamples
from moqe.errors import CheckpointError
from moqe.folder import CERTIFICATE, MixtureFolder
from moqe.formats import (
    CompressedTensorsWriter,
    GgufWriter,
    open_expert,
    same_computation,
    same_tokenizer,
    write_shared,
)
from moqe.formats.expert_files import ExpertWriter
from moqe.formats.gguf_split import gguf_paths
from moqe.formats.open import is_gguf
from moqe.formats.safetensors_folder import save_tensors
from moqe.methods import METHODS
from moqe.methods.block import BlockResult, quantize_block
from moqe.methods.certificate import LayerRecord, certify
from moqe.models.activations import quantize_inputs
from moqe.models.calibration import CalibratedBlock, calibrate
from moqe.models.clusters import text_clusters
from moqe.models.decoder import Decoder
from moqe.models.device import product_dtype
from moqe.models.skeleton import assign
from moqe.models.weights import resolve_base
from moqe.progress import Progress
from moqe.recipe import Expert, Recipe
from moqe.schemes import Scheme, scheme
from moqe.store import canonical_hash, digest_files, link, read_json, write_json
from moqe.tasks.distiller import Distiller

log = logging.getLogger("moqe")


class ExpertMaker:
    """Makes the experts of a recipe in a mixture's folder.

    schemes: the number format of every expert that has a method. decoder: the base model.
    """

    def __init__(self, recipe: Recipe, schemes: Mapping[str, Scheme], decoder: Decoder, folder: MixtureFolder) -> None:
        self.recipe, self.schemes, self.decoder, self.folder = recipe, schemes, decoder, folder
        self.parameter_dtype = decoder.stored_dtype
        self.scale_dtype = torch.float16 if self.parameter_dtype == torch.float16 else torch.bfloat16

    def run(self, samples: TextSamples, progress: Progress) -> None:
        """Make every expert that is not complete. Raises what methods, formats and the base model raise."""
        with progress.track("write what experts share", 1) as advance:
            write_shared(self.decoder.folder, self.folder.shared)
            write_json(self.folder.shared / "config.json", read_json(self.decoder.folder / "config.json"))
            advance(1)
        unfinished = [expert for expert in self.recipe.experts if not self.folder.certificate(expert.name).exists()]
        for expert in unfinished:
            if expert.checkpoint:
                self._adopt(expert, progress)
        samples = self._labelled(samples)
        pending = [e for e in self.recipe.experts if not e.codes_of and e.method and self._is_pending(e)]
        together = [expert for expert in pending if not expert.sequential]
        passes = [together] if together else []
        passes += [[expert] for expert in pending if expert.sequential]
        seen = samples.select(samples.spread(self.recipe.data.calibration_samples))  # more are for distillation
        for experts in passes:
            self._one_pass(experts, seen, progress)
        if any(expert.distill is not None for expert in unfinished):
            Distiller(self.recipe, self.schemes, self.decoder, self.folder, samples).run(progress)

    def _is_pending(self, expert: Expert) -> bool:
        """Whether an expert's codes are still to be made: they are not there, and somebody unfinished needs them."""
        if (self._place(expert) / CERTIFICATE).exists():
            return False
        family = [other for other in self.recipe.experts if expert.name in (other.name, other.codes_of)]
        return any(not self.folder.certificate(other.name).exists() for other in family)

    def _labelled(self, samples: TextSamples) -> TextSamples:
        """The windows with what statistics and distillation tell them apart by: their domains, or clusters."""
        specialists = self.recipe.specialists
        if specialists is None or specialists.by == "domain":
            return samples
        names = specialists.labels(self.recipe.data.calibration)
        clusters = text_clusters(samples.tokens, self.decoder.embedding(), len(names), self.recipe.seed)
        return replace(samples, domain=tuple(names[cluster] for cluster in clusters))

    def _place(self, expert: Expert) -> Path:
        """Where an expert's method leaves its files: in the expert's folder unless they are distilled afterwards."""
        return self.folder.expert(expert.name) if expert.distill is None else self.folder.quantized(expert.name)

    def _one_pass(self, experts: Sequence[Expert], samples: TextSamples, progress: Progress) -> None:
        """Calibrate once, make all of `experts`."""
        writers = {expert.name: self._writer(expert) for expert in experts}
        blocks = range(self.decoder.number_of_blocks)
        missing = [k for k in blocks if any(not self._done(expert, writers[expert.name], k) for expert in experts)]
        if missing:
            sequential = experts[0] if experts[0].sequential else None
            replace = None if sequential is None else lambda k, block: self._replace(sequential, k, block)
            products = product_dtype(str(self.decoder.device), self.recipe.data.calibration_precision)
            calibrated = calibrate(
                self.decoder, samples, start_block=missing[0], products=products, replace=replace, progress=progress
            )
            twins: dict[str, list[Expert]] = {}  # a generalist of gptq has gptq's own codes
            for expert in experts:
                key = canonical_hash(expert.model_dump(mode="json", exclude={"name", "distill"}))
                twins.setdefault(key, []).append(expert)
            for block in calibrated:
                for alike in twins.values():
                    pending = [e for e in alike if not self._done(e, writers[e.name], block.index)]
                    if pending:
                        result = self._quantize(pending[0], block)
                        for expert in pending:
                            self._store(expert, writers[expert.name], block, result)
        with progress.track("complete files", len(experts)) as advance:
            for expert in experts:
                writers[expert.name].finish()
                records = [
                    LayerRecord.from_json(layer)
                    for k in blocks
                    for layer in read_json(self._record(expert, k))["layers"]
                ]
                certificate = certify(expert, records, METHODS[expert.method].calibrated)
                write_json(self._place(expert) / CERTIFICATE, certificate.to_json())
                advance(1)

    def _quantize(self, expert: Expert, block: CalibratedBlock) -> BlockResult:
        """One block's linears by an expert's method."""
        return quantize_block(
            block.module,
            block.groups,
            block.statistics,
            expert,
            self.schemes[expert.name],
            prefix=block.name,
            scale_dtype=torch.float32 if self.schemes[expert.name].scale_bits == 32 else self.scale_dtype,
            parameter_dtype=self.parameter_dtype,
        )

    def _store(self, expert: Expert, writer: ExpertWriter, block: CalibratedBlock, result: BlockResult) -> None:
        """Write one block of one expert, its record first: a written block has its record."""
        tensors = result.tensors
        write_json(self._record(expert, block.index), {"layers": [layer.to_json() for layer in result.layers]})
        if expert.sequential:
            plain = {
                name.removeprefix(f"{block.name}."): value.float() if isinstance(value, Tensor) else value.dequantize()
                for name, value in tensors.items()
            }
            save_tensors(self._replacement(expert, block.index), plain)
        writer.write(block.index, tensors)

    def _writer(self, expert: Expert) -> ExpertWriter:
        folder, base, shared = self._place(expert), self.decoder.folder, self.folder.shared
        scheme, blocks = self.schemes[expert.name], self.decoder.number_of_blocks
        if scheme.is_block:
            return GgufWriter(folder, base, shared, scheme, blocks, self.folder.work / "blocks" / expert.name)
        split = expert.distill is not None or any(other.codes_of == expert.name for other in self.recipe.experts)
        return CompressedTensorsWriter(folder, base, shared, scheme, blocks, split=split)

    def _done(self, expert: Expert, writer: ExpertWriter, block: int) -> bool:
        return writer.has(block) and self._record(expert, block).exists()

    def _record(self, expert: Expert, block: int) -> Path:
        return self.folder.work / "records" / expert.name / f"block-{block:05d}.json"

    def _replacement(self, expert: Expert, block: int) -> Path:
        return self.folder.work / "sequential" / expert.name / f"block-{block:05d}.safetensors"

    @contextmanager
    def _replace(self, expert: Expert, index: int, block: nn.Module) -> Iterator[None]:
        """Let a block run as the expert's, inside the context, so that the next block sees what that produces.

        It has the expert's dequantized weights, and its linears round their inputs where the scheme says so.
        """
        for name, tensor in load_file(self._replacement(expert, index)).items():
            assign(block, name, tensor.to(self.decoder.device, self.decoder.dtype))
        hooks = []
        for layer in read_json(self._record(expert, index))["layers"]:
            bits = scheme(layer["scheme_used"]).activation_bits if layer["scheme_used"] else 16
            if bits < 16:
                linear = layer["name"].removeprefix(f"{self.decoder.block_names[index]}.").removesuffix(".weight")
                hooks.append(quantize_inputs(block.get_submodule(linear), bits))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _adopt(self, expert: Expert, progress: Progress) -> None:
        """Take an existing checkpoint into the mixture: link its files after checking that it belongs to the base.

        Raises CheckpointError for another tokenizer, another computation, other parameters or damaged files.
        """
        source = Path(expert.checkpoint).expanduser()
        if not source.exists():
            source = resolve_base(expert.checkpoint)
        if source.is_file():
            files = gguf_paths(source) if is_gguf(source) else [source]
        else:
            certificate_of_another = self.folder.certificate(expert.name).name
            files = sorted(path for path in source.iterdir() if path.is_file() and path.name != certificate_of_another)
        if not files:
            raise CheckpointError(f"{source} holds no files: give expert {expert.name!r} a checkpoint's folder or file")
        same_tokenizer(self.decoder.folder, source)
        same_computation(self.decoder.folder, source)
        opened = open_expert(source)
        shapes = {
            name: shape
            for k in range(self.decoder.number_of_blocks)
            for name, shape in self.decoder.block_parameters(k).items()
        }
        lacking = sorted(set(shapes) - set(opened.names()))
        if lacking:
            raise CheckpointError(f"{source} is no checkpoint of this base model: it lacks {lacking[0]}")
        for path in files:
            link(path, self.folder.expert(expert.name) / path.name)
        digests = digest_files(files, f"digest {expert.name}", progress)
        certificate = {
            "expert": expert.name,
            "checkpoint": expert.checkpoint,
            "format": opened.format,
            "files": {path.name: digest for path, digest in zip(files, digests, strict=True)},
        }
        write_json(self.folder.certificate(expert.name), certificate)
