"""Publishing a verdict: card and report in the mixture's folder, from the files that the build left there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from moqe.evaluate import format as write
from moqe.evaluate.agreement import read_agreements
from moqe.evaluate.card import write_card
from moqe.evaluate.contact import ContactSheet
from moqe.evaluate.context import CandidateRow, DistilledRow, MemoryPoint, ReportContext, Substitution
from moqe.evaluate.metrics import METRICS, Metric
from moqe.evaluate.report import write_report
from moqe.evaluate.verdict import Verdict
from moqe.folder import MixtureFolder
from moqe.recipe import Recipe, dump_recipe
from moqe.store import read_json, reading


def publish(place: MixtureFolder, verdict: Verdict, recipe: Recipe, contact: ContactSheet | None = None) -> None:
    """Write README.md and report.html. Raises CheckpointError when a certificate or a router's selection is damaged.

    contact: images on which experts disagree, where samples are images.
    """
    metric = METRICS[verdict.metric]
    context = replace(gather(place, recipe, tuple(verdict.protocols), metric), contact=contact)
    write_card(place.card, verdict, context)
    write_report(place.report, verdict, context)


def gather(place: MixtureFolder, recipe: Recipe, protocols: tuple[str, ...], metric: Metric) -> ReportContext:
    """What card and report say beside the verdict, read from certificates and from the routers' selection.

    metric: what routers were compared by.
    """
    substituted: list[Substitution] = []
    distilled: list[DistilledRow] = []
    memory: list[MemoryPoint] = []
    for expert in recipe.experts:
        if place.certificate(expert.name).exists():
            with reading(place.certificate(expert.name)):
                certificate = read_json(place.certificate(expert.name))
                substituted += [
                    Substitution(expert.name, layer["name"], layer["substituted"])
                    for layer in certificate.get("layers", [])
                    if layer["substituted"]
                ]
                if "divergence" in (certificate.get("distilled") or {}):
                    distilled.append(_distilled(expert.name, certificate))
                    memory += [MemoryPoint(**point) for point in certificate["distilled"].get("memory_curve", [])]
    paths = {name: place.router(name) / "selection.json" for name in protocols}
    candidates, guards, to_beat = {}, {}, ReportContext.to_beat
    for name, path in paths.items():
        if path.exists():
            with reading(path):
                selection = read_json(path)
                candidates[name], guards[name] = _candidates(selection, metric), _guard(selection, metric)
                to_beat = selection["generalist"] or to_beat
    return ReportContext(
        base=recipe.base,
        recipe_yaml=dump_recipe(recipe),
        candidates=candidates,
        guards=guards,
        substitutions=tuple(substituted),
        to_beat=to_beat,
        distilled=tuple(distilled),
        memory=tuple(memory),
        agreements=tuple(read_agreements(place.agreement)),
    )


def _distilled(expert: str, certificate: Mapping[str, Any]) -> DistilledRow:
    """What a certificate says about the training of an expert's scales."""
    found = certificate["distilled"]
    curve = {int(step): float(value) for step, value in found["divergence"].items()}
    own = found.get("own", {"windows": 0, "words": []})
    blocks = {layer["name"].rpartition(".layers.")[2].partition(".")[0] for layer in certificate.get("layers", [])}
    return DistilledRow(
        expert,
        certificate["codes_of"],
        before=curve[min(curve)],
        after=curve[found["kept_step"]],
        step=found["kept_step"],
        steps=found["steps"],
        windows=own["windows"],
        words=tuple(own["words"]),
        own_share=len(found["blocks"]) / max(1, len(blocks)) if "blocks" in found else None,
        text_weight=found.get("text_weight", 0.0),
    )


def _candidates(selection: Mapping[str, Any], metric: Metric) -> tuple[CandidateRow, ...]:
    """The routers that the deployed preset compared."""
    fitted = selection[selection["deployed"]]
    return tuple(
        CandidateRow(
            row["name"],
            metric.value_of_cost(row["loss"]),
            row["gain"]["value"],
            row["gain"]["standard_error"],
            row["name"] == fitted["chosen"],
        )
        for row in fitted["candidates"]
    )


def _guard(selection: Mapping[str, Any], metric: Metric) -> str:
    """What the deployed router's guard saw and did, and what was novel; empty where there is neither."""
    fitted = selection[selection["deployed"]]
    novelty, sentences = fitted["novelty"], [_guarded(fitted["guard"], selection["experts"], metric)]
    if novelty is not None:
        sentences.append(
            f"Of the router's own samples {write.percent(novelty['novel'], 1)} were unlike those of other documents; "
            f"such samples go to {selection['generalist']}."
        )
    return " ".join(filter(None, sentences))


def _guarded(guard: Mapping[str, Any] | None, experts: Sequence[str], metric: Metric) -> str:
    if guard is None:
        return ""
    gain, fallback = guard["gain"], experts[guard["fallback"]]
    value, error = write.metric_difference(gain["value"], metric), write.metric_value(gain["standard_error"], metric)
    seen = f"{value} \N{PLUS-MINUS SIGN} {error} {metric.difference_label}"
    if not guard["kept"]:
        return f"The guard replaced the router by {fallback}: its gain on validation was {seen}."
    return (
        f"The guard kept the router: its gain on validation was {seen}, with {write.percent(guard['switched'])} of the "
        f"samples moved away from {fallback}."
    )
