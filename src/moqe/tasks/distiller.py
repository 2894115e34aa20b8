"""From quantized experts to distilled ones: families that share codes, trained one after the other, in rounds.

A family is an expert with codes of its own and those that take them over (`codes_of`). All of a family are trained on
one student, whose codes are in memory once. A specialist branches from the owner's training (`branch_after`), so that
every member has had the same number of steps.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moqe.data.samples import TextSamples
from moqe.expert_options import GENERALIST, OWN_WEIGHTS, Specialists
from moqe.folder import CERTIFICATE, MixtureFolder
from moqe.formats import CompressedTensorsWriter, GgufWriter, open_expert
from moqe.formats.compressed_tensors import SHARED_TENSORS
from moqe.formats.expert_files import ExpertWriter
from moqe.method_options import Distill
from moqe.methods.certificate import significant
from moqe.methods.distill import Distilled, Student, Targets, TrainingSet, distill, snapshot_path, window_schedule
from moqe.models.clusters import telling_tokens
from moqe.models.decoder import Decoder
from moqe.models.device import product_dtype
from moqe.models.shared import open_shared
from moqe.progress import Progress
from moqe.recipe import Expert, Recipe
from moqe.schemes import Scheme
from moqe.store import read_json, write_json
from moqe.tasks.allotment import Unit, allot, block_gains, mixed_state

log = logging.getLogger("moqe")

_ROWS, _CURVE = 4, 5  # windows at once; points of the memory curve


@dataclass(frozen=True)
class Family:
    """Experts to distill that have the codes of `owner`, which comes first if it is distilled itself."""

    owner: Expert
    members: tuple[Expert, ...]


def families(experts: Sequence[Expert]) -> list[Family]:
    """The experts that are to be distilled, by whose codes they have."""
    by_name = {expert.name: expert for expert in experts}
    members: dict[str, list[Expert]] = {}
    for expert in experts:
        if expert.distill is not None:
            members.setdefault(expert.codes_of or expert.name, []).append(expert)
    return [
        Family(by_name[owner], tuple(sorted(found, key=lambda expert: bool(expert.codes_of))))
        for owner, found in members.items()
    ]


class Distiller:
    """Distils the experts of a recipe in a mixture's folder, from what their methods left there."""

    def __init__(
        self,
        recipe: Recipe,
        schemes: Mapping[str, Scheme],
        decoder: Decoder,
        folder: MixtureFolder,
        samples: TextSamples,
    ) -> None:
        self.recipe, self.schemes, self.decoder, self.folder = recipe, schemes, decoder, folder
        self.samples = samples
        self._targets: dict[torch.dtype, Targets] = {}

    def run(self, progress: Progress) -> None:
        """Distil every expert that has no certificate yet."""
        for family in families(self.recipe.experts):
            unfinished = [e for e in family.members if not self.folder.certificate(e.name).exists()]
            if unfinished:
                self._distil(family, unfinished, progress)

    def _distil(self, family: Family, unfinished: Sequence[Expert], progress: Progress) -> None:
        source = self._source(family.owner)
        files = open_expert(source)
        norms = any(member.distill is not None and member.distill.norms for member in family.members)
        student = Student(self._skeleton, files, norms=norms)
        labels, rounds = list(self.samples.domain), []
        found = {member.name: self._train(student, family, member, labels, 0, progress) for member in family.members}
        options = self._family_options(family)
        # An expert that a recipe lists with the generalist's codes takes no part in rounds, and keeps its own scales.
        specialists = [member for member in family.members if member.codes_of and member in self.recipe.family]
        wanted = 0 if options is None else options.rounds
        score = self._half_split(student, family, found, progress) if wanted else 0.0
        for number in range(1, wanted + 1):
            place = self.folder.training(family.owner.name) / f"assigned-{number}.json"
            assigned = self._assign(student, found, specialists, place, progress)
            again = found | {
                member.name: self._train(student, family, _owning(member), assigned, number, progress)
                for member in specialists
            }
            now = self._half_split(student, family, again, progress)
            rounds.append({"round": number, "before": significant(score), "after": significant(now)})
            if now >= score:
                break
            found, score, labels = again, now, assigned
        own, curve = self._allot(student, family, specialists, found, labels, source, progress)
        for member in family.members:
            if member in unfinished:
                facts = {
                    "rounds": rounds,
                    "blocks": own.get(member.name),
                    "memory_curve": curve.get(member.name),
                    "own": self._own_windows(member, labels),
                }
                student.load_state(found[member.name].state)
                self._write(member, family.owner, source, student, found[member.name], facts)

    def _family_options(self, family: Family) -> Specialists | None:
        """The recipe's `specialists`, where this is their family and not experts that were listed one by one."""
        mine = family.owner.name == GENERALIST and len(family.members) > 1
        return self.recipe.specialists if mine else None

    def _allot(
        self,
        student: Student,
        family: Family,
        specialists: Sequence[Expert],
        found: Mapping[str, Distilled],
        labels: Sequence[str],
        source: Path,
        progress: Progress,
    ) -> tuple[dict[str, list[int]], dict[str, list[dict[str, float]]]]:
        """Which blocks of each specialist get their own scales, and the generalist's curve of memory and divergence.

        Both are empty where the recipe does not bound memory.
        """
        options = self._family_options(family)
        if options is None or options.memory is None or family.owner.distill is None:
            return {}, {}
        blocks, general = self.decoder.block_names, found[family.owner.name].state
        data = self._data(family.owner.distill, labels, progress)
        validation = data.validation.tolist()
        windows = {
            member.name: torch.tensor([row for row in validation if labels[row] in _own_labels(member)])
            for member in specialists
        }
        size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
        files = [next(source.glob(f"scales-{index + 2:05d}-*")).stat().st_size for index in range(len(blocks))]
        units = []
        with progress.track("distill: where it pays", len(specialists)) as advance:
            for member in specialists:
                if len(windows[member.name]):
                    gains = block_gains(
                        student,
                        data.targets,
                        self.samples.tokens,
                        windows[member.name],
                        general,
                        found[member.name].state,
                        blocks,
                    )
                    units += [Unit(member.name, k, files[k], gain) for k, gain in enumerate(gains)]
                advance(1)
        chosen = allot(units, int((options.memory - 1.0) * size))
        curve = []
        with progress.track("distill: memory curve", _CURVE) as advance:
            for point in range(_CURVE):
                part = chosen[: round(len(chosen) * point / (_CURVE - 1))]
                values = []
                for member in specialists:
                    mine = [unit.block for unit in part if unit.expert == member.name]
                    student.load_state(mixed_state(general, found[member.name].state, mine, blocks))
                    if len(windows[member.name]):
                        values.append(float(self._divergence(student, data.targets, windows[member.name]).mean()))
                spent = 1.0 + sum(unit.bytes for unit in part) / size
                curve.append({"memory": significant(spent), "divergence": significant(float(np.mean(values)))})
                advance(1)
        own = {member.name: sorted(u.block for u in chosen if u.expert == member.name) for member in specialists}
        return own, {family.owner.name: curve}

    def _train(
        self, student: Student, family: Family, expert: Expert, labels: Sequence[str], number: int, progress: Progress
    ) -> Distilled:
        """Train one expert; where its own weight is open, with each of OWN_WEIGHTS, keeping the best for its domain."""
        assert expert.distill is not None
        data = self._data(expert.distill, labels, progress)
        open_labels = [label for label, weight in expert.distill.weights.items() if weight is None]
        branches = {
            member.distill.branch_after for member in family.members if member.distill is not None and member.codes_of
        } - {0}
        best: Distilled | None = None
        for own, weights in _candidates(expert.distill).items():
            options = expert.distill.model_copy(update={"weights": weights})
            folder = self.folder.training(expert.name) / f"round-{number}" / f"own-{own:g}"
            start = None
            if expert.codes_of and options.branch_after:
                start = snapshot_path(
                    self.folder.training(family.owner.name) / "round-0" / "own-1", options.branch_after
                )
            result = distill(
                student,
                data,
                options,
                self.recipe.seed,
                folder,
                start=start,
                snapshots=frozenset() if expert.codes_of else frozenset(branches),
                progress=progress,
                name=expert.name,
            )
            if best is None or self._own(student, data, result, open_labels) < self._own(
                student, data, best, open_labels
            ):
                best = result
        assert best is not None
        return best

    def _own(self, student: Student, data: TrainingSet, result: Distilled, labels: Sequence[str]) -> float:
        """A state's divergence on the validation windows of `labels`."""
        rows = torch.tensor([row for row in data.validation.tolist() if data.label[row] in labels], dtype=torch.int64)
        if not len(rows):
            return 0.0  # nothing tells the candidates apart, so the first one stays
        student.load_state(result.state)
        return float(self._divergence(student, data.targets, rows).mean())

    def _assign(
        self,
        student: Student,
        found: Mapping[str, Distilled],
        specialists: Sequence[Expert],
        place: Path,
        progress: Progress,
    ) -> list[str]:
        """For every calibration window the name of the specialist that follows the target most closely on it.

        As `place` says it if it is there, and written to it: a resumed build need not look at every window again.
        """
        if place.exists():
            known: list[str] = read_json(place)
            return known
        assert specialists[0].distill is not None
        rows, targets = torch.arange(len(self.samples)), self._followed(specialists[0].distill, progress)
        with progress.track("distill: assign windows", len(specialists)) as advance:
            columns = []
            for member in specialists:
                student.load_state(found[member.name].state)
                columns.append(self._divergence(student, targets, rows))
                advance(1)
        choice = torch.stack(columns, dim=1).argmin(1)
        assigned = [specialists[int(index)].name for index in choice]
        write_json(place, assigned)
        return assigned

    def _own_windows(self, member: Expert, labels: Sequence[str]) -> dict[str, Any] | None:
        """How many calibration windows a specialist is for, and the words that tell them from the others."""
        inside = [label in _own_labels(member) for label in labels]
        if not any(inside) or all(inside):
            return None
        decode = partial(self.decoder.tokenizer.decode, skip_special_tokens=True)
        return {"windows": sum(inside), "words": telling_tokens(self.samples.tokens, inside, decode)}

    def _half_split(
        self, student: Student, family: Family, found: Mapping[str, Distilled], progress: Progress
    ) -> float:
        """The family's divergence on validation windows: who answers is chosen on the first half, scored on the second.

        So a family whose members differ by chance only does not look better than one expert.
        """
        assert family.owner.distill is not None
        data = self._data(family.owner.distill, self.samples.domain, progress)
        rows, halves = data.validation, []
        for result in found.values():
            student.load_state(result.state)
            parts = [data.targets.halves(student, self.samples.tokens, part) for part in torch.split(rows, _ROWS)]
            halves.append(torch.cat(parts))  # (rows, 2)
        table = torch.stack(halves, dim=1)  # (rows, experts, 2)
        chosen = table[:, :, 0].argmin(1)
        return float(table[torch.arange(len(rows)), chosen, 1].mean())

    def _divergence(self, student: Student, targets: Targets, rows: Tensor) -> Tensor:
        return torch.cat([targets.divergence(student, self.samples.tokens, part) for part in torch.split(rows, _ROWS)])

    def _data(self, options: Distill, labels: Sequence[str], progress: Progress) -> TrainingSet:
        train, validation = self._rows(options)
        targets = self._followed(options, progress)
        return TrainingSet(self.samples.tokens, labels, targets, train, validation)

    def _followed(self, options: Distill, progress: Progress) -> Targets:
        """What a training with these options follows; what the base says is computed once a precision."""
        dtype = product_dtype(str(self.decoder.device), options.precision)
        if dtype not in self._targets:
            self._targets[dtype] = Targets.later(self.decoder, self.samples.tokens, dtype, progress, self._shown())
        return replace(self._targets[dtype], text_weight=options.text_weight)

    def _shown(self) -> Tensor | None:
        """Rows of the windows that some training shows or validates on; None for all, which alternation looks at.

        They depend on the recipe alone, so that a resumed build runs the base over the same ones in the same batches.
        """
        if self.recipe.specialists is not None and self.recipe.specialists.rounds:
            return None
        found: set[int] = set()
        for expert in self.recipe.experts:
            if expert.distill is not None:
                train, validation = self._rows(expert.distill)
                length = expert.distill.steps * expert.distill.batch_windows
                for weights in _candidates(expert.distill).values() if len(train) else ():  # `distill` says what lacks
                    schedule = window_schedule(self.samples.domain, train, weights, length, self.recipe.seed)
                    found |= {*schedule.tolist(), *validation.tolist()}
        return torch.tensor(sorted(found))

    def _rows(self, options: Distill) -> tuple[Tensor, Tensor]:
        """Rows to train on and to validate on."""
        train, validation = validation_rows(self.samples, options, self.recipe.seed)
        seen = self.samples.spread(options.samples or self.recipe.data.calibration_samples)
        return train[torch.isin(train, torch.tensor(seen))], validation

    @cached_property
    def _skeleton(self) -> torch.nn.Module:
        shared = self.folder.shared
        return open_shared(shared, shared / SHARED_TENSORS, str(self.decoder.device)).model

    def _source(self, owner: Expert) -> Path:
        """Where the codes are: as the method left them."""
        return self.folder.expert(owner.name) if owner.distill is None else self.folder.quantized(owner.name)

    def _write(
        self,
        expert: Expert,
        owner: Expert,
        source: Path,
        student: Student,
        result: Distilled,
        facts: Mapping[str, Any],
    ) -> None:
        """Write an expert's folder in the state the student has now, its certificate last.

        facts: what the certificate says beside the training; `blocks` are those with scales of their own, None for all.
        """
        writer = self._writer(expert, owner, source)
        tensors = student.tensors()
        for index, name in enumerate(self.decoder.block_names):
            if writer.has(index):
                continue
            if facts["blocks"] is not None and index not in facts["blocks"]:
                assert isinstance(writer, CompressedTensorsWriter)
                writer.link_scales(index, self.folder.expert(owner.name))
            else:
                writer.write(index, {key: value for key, value in tensors.items() if key.startswith(f"{name}.")})
        writer.finish()
        certificate = read_json(source / CERTIFICATE)
        assert expert.distill is not None
        distilled = {
            "steps": expert.distill.steps,
            "kept_step": result.step,
            "divergence": {str(step): significant(value) for step, value in result.divergence.items()},
            "weights": dict(expert.distill.weights),
            **({"text_weight": expert.distill.text_weight} if expert.distill.text_weight else {}),
            **{name: value for name, value in facts.items() if value is not None},
        }
        write_json(
            self.folder.certificate(expert.name),
            certificate | {"expert": expert.name, "codes_of": expert.codes_of, "distilled": distilled},
        )

    def _writer(self, expert: Expert, owner: Expert, source: Path) -> ExpertWriter:
        folder, base, shared = self.folder.expert(expert.name), self.decoder.folder, self.folder.shared
        scheme, blocks = self.schemes[expert.name], self.decoder.number_of_blocks
        if scheme.is_block:
            return GgufWriter(folder, base, shared, scheme, blocks, self.folder.work / "blocks" / expert.name)
        return CompressedTensorsWriter(folder, base, shared, scheme, blocks, codes_of=source)


def _candidates(options: Distill) -> dict[float, dict[str, float]]:
    """The weights of labels to train with, by what stands for one that is open."""
    tried = OWN_WEIGHTS if None in options.weights.values() else (1.0,)
    return {own: {k: own if weight is None else weight for k, weight in options.weights.items()} for own in tried}


def _own_labels(member: Expert) -> set[str]:
    """The labels that a specialist is for: its domain or cluster, and itself after windows were assigned."""
    assert member.distill is not None
    return {member.name, *(label for label, weight in member.distill.weights.items() if weight != 1.0)}


def _owning(member: Expert) -> Expert:
    """A specialist after windows were assigned to experts: its own windows are labelled with its name."""
    assert member.distill is not None
    weights = [weight for weight in member.distill.weights.values() if weight != 1.0]
    own = {member.name: weights[0] if weights else 1.0}
    return member.model_copy(update={"distill": member.distill.model_copy(update={"weights": own})})


def validation_rows(samples: TextSamples, options: Distill, seed: int) -> tuple[Tensor, Tensor]:
    """Rows to train on and rows to validate on, of disjoint documents; every domain gives its share of documents.

    A document whose windows are in several clusters counts for the one that most of them are in.
    """
    random = np.random.default_rng([seed, 1])
    within: dict[str, Counter[str]] = {}
    for document, domain in zip(samples.document, samples.domain, strict=True):
        within.setdefault(document, Counter())[domain] += 1
    documents: dict[str, list[str]] = {}
    for document, windows in within.items():
        documents.setdefault(windows.most_common(1)[0][0], []).append(document)
    kept: set[str] = set()
    for domain in sorted(documents):
        names = documents[domain]
        wanted = min(max(1, round(options.validation_share * len(names))), len(names) - 1)
        kept |= {names[index] for index in random.permutation(len(names))[:wanted]}
    inside = np.array([document in kept for document in samples.document])
    validation = np.flatnonzero(inside)
    if len(validation) > options.validation_windows:
        # Evenly over the domains: take each domain's first window, then each one's second, ...
        domains = np.array(samples.domain)[validation]
        turn = np.array([int((domains[:index] == domain).sum()) for index, domain in enumerate(domains)])
        validation = np.sort(validation[np.argsort(turn, kind="stable")[: options.validation_windows]])
    return torch.from_numpy(np.flatnonzero(~inside)), torch.from_numpy(validation)
