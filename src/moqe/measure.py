"""The steps of a build that measure: score experts, fit routers, judge the mixture.

Each leaves its result in the folder and does nothing that is there already.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from moqe.data.protocols import WHOLE, visible_tokens
from moqe.data.samples import TextSamples
from moqe.errors import MoqeError
from moqe.evaluate import BASE, LossTable, LossTableFile, Predictions, judge, read_losses, read_predictions
from moqe.evaluate.agreement import add_agreements, agreement
from moqe.evaluate.contact import contact_sheet
from moqe.evaluate.domain_label import fit_domain_label
from moqe.evaluate.judge import CASCADE, MIXTURE
from moqe.evaluate.publish import publish
from moqe.evaluate.routing import JUDGING_STEPS, ROUTERS, Answers, RoutingData, answer, fit_routers
from moqe.evaluate.verdict import ExpertSummary, Verdict, write_verdict
from moqe.folder import MixtureFolder
from moqe.mixture import LanguageMixture, load
from moqe.progress import Advance, Progress
from moqe.recipe import Expert, Policy, Recipe
from moqe.router import load_cascade, load_router, save_cascade, save_router
from moqe.router.policy_file import FILE as CASCADE_FILE
from moqe.store import disk_bytes, write_json
from moqe.tasks import ExpertFacts, Task

_AGREEMENT_WINDOWS = 48  # spread over the test windows, so over all domains
ROUTER_SPLITS = ("router_train", "router_validation")


def _table(task: Task, recipe: Recipe, place: MixtureFolder, splits: Sequence[str]) -> LossTableFile:
    names = [BASE, *(expert.name for expert in recipe.experts)]
    described = {split: task.describe(split) for split in splits}
    return LossTableFile(place.work / "losses", names, described, task.metrics, task.runtime_name, task.chunk_samples)


def measured(task: Task, place: MixtureFolder) -> bool:
    """Whether the folder holds everything that was to be measured."""
    return place.losses.exists() and (not task.classes or place.predictions.exists())


def score(task: Task, recipe: Recipe, place: MixtureFolder, splits: Sequence[str], progress: Progress) -> None:
    """Score base and experts on the splits, skipping what is scored already."""
    table = _table(task, recipe, place, splits)
    for expert in table.experts:
        pending = [chunk for split in splits for chunk in table.pending(expert, split)]
        if not pending:
            continue
        with progress.track(f"score {expert}", sum(len(chunk.rows) for chunk in pending)) as advance:
            for chunk in pending:
                table.add(chunk, task.losses(expert, chunk.split, chunk.rows))
                advance(len(chunk.rows))


def train_routers(task: Task, recipe: Recipe, place: MixtureFolder, progress: Progress) -> None:
    """Fit the routers of every protocol. `selection.json` is written last and says that a protocol is done."""
    table, predictions = place.work / "router-losses.parquet", place.work / "router-predictions.parquet"
    _table(task, recipe, place, ROUTER_SPLITS).merge(table, predictions)
    for protocol in task.protocols:
        done = place.router(protocol) / "selection.json"
        if done.exists():
            continue
        train, validation = (
            RoutingData(
                read_losses(table, split, protocol, task.router_metric),
                read_losses(table, split, protocol, task.metric),
                task.features(split, protocol),
                read_predictions(predictions, split),
            )
            for split in ROUTER_SPLITS
        )
        fitted = fit_routers(
            train, validation, recipe.router, task.modality, recipe.seed, progress, _generalist(recipe)
        )
        for name, router in fitted.routers.items():
            save_router(router, place.router(protocol) / name)
        task.deploy(fitted.routers[MIXTURE], place.router(protocol) / MIXTURE)
        if fitted.cascade is not None:
            save_cascade(fitted.cascade, place.router(protocol) / MIXTURE)
        write_json(done, dict(fitted.selection))


def judge_mixture(task: Task, recipe: Recipe, place: MixtureFolder, progress: Progress) -> None:
    """Score the test samples where that is not done, judge every protocol, write verdict, report and card."""
    if not measured(task, place):
        score(task, recipe, place, ("test",), progress)
        _table(task, recipe, place, (*ROUTER_SPLITS, "test")).merge(place.losses, place.predictions)
    predictions = read_predictions(place.predictions, "test")
    protocols, answers = {}, {}
    with progress.track("judge", len(task.protocols) * (JUDGING_STEPS + 1)) as advance:
        for protocol in task.protocols:
            test = {metric: read_losses(place.losses, "test", protocol, metric) for metric in task.metrics}
            answers[protocol] = _answer(task, recipe, place, protocol, test, predictions, advance)
            protocols[protocol] = judge(
                test,
                read_losses(place.losses, "router_validation", protocol, task.metric),
                answers[protocol].outcomes,
                recipe.seed,
                recipe.bootstrap_samples,
                predicted=answers[protocol].predicted,
                policy=_policy(recipe, protocol),
            )
            advance(1)
    facts = task.facts()
    verdict = Verdict(
        recipe.hash,
        task.metric,
        task.protocols[0],
        protocols,
        {expert.name: _summary(expert, facts[expert.name]) for expert in recipe.experts},
        facts[BASE].bytes_on_disk,
        disk_bytes(place.path / "experts") + disk_bytes(place.shared) - _linked_twice(place),
        recipe.seed,
        recipe.bootstrap_samples,
        also=list(task.metrics[1:]),
        router_metric=task.router_metric,
        text_weight=max((expert.distill.text_weight for expert in recipe.experts if expert.distill), default=0.0),
    )
    write_verdict(place.verdict, verdict)
    contact = None
    if predictions is not None:
        mixture = answers[verdict.deployed].outcomes[MIXTURE]
        contact = contact_sheet(predictions, mixture, task.classes, partial(task.picture, "test"))
    publish(place, verdict, recipe, contact)


def measure_agreement(task: Task, place: MixtureFolder, runtime: str, device: str, progress: Progress) -> None:
    """Compare a runtime with the reference on every expert and some test windows; the numbers go into the folder.

    Raises MoqeError for the reference itself, an unknown runtime, and a mixture that is not of texts.
    """
    samples = task.splits()["test"]
    if not isinstance(samples, TextSamples):
        raise MoqeError(f"{place.path} is no mixture of texts: runtimes of image experts are not compared here")
    if runtime == "reference":
        raise MoqeError("the reference runtime is what others are compared with: name another")
    exact, other = load(place.path, device, progress), load(place.path, device, progress, runtime)
    assert isinstance(exact, LanguageMixture)
    assert isinstance(other, LanguageMixture)
    tokens = samples.tokens[:: -(-len(samples) // _AGREEMENT_WINDOWS)]
    with progress.track(f"compare {runtime}", len(tokens) * len(exact.experts)) as advance:
        found = [agreement(name, exact.runtime(name), other.runtime(name), tokens, advance) for name in exact.experts]
    add_agreements(place.agreement, found)


def _answer(
    task: Task,
    recipe: Recipe,
    place: MixtureFolder,
    protocol: str,
    test: Mapping[str, LossTable],
    predictions: Predictions | None,
    advance: Advance,
) -> Answers:
    """What the folder's routers and policies of one protocol do with the test samples."""
    routers = {name: load_router(place.router(protocol) / name) for name in ROUTERS}
    experts = tuple(expert.name for expert in recipe.experts)
    cascade, deployed = None, place.router(protocol) / MIXTURE
    wanted = recipe.router.policy == CASCADE or (deployed / CASCADE_FILE).exists()  # without enough images: none
    if predictions is not None and len(experts) > 1 and wanted:
        cascade = load_cascade(deployed, len(experts))
    runs_first = None if task.feature_expert is None else experts.index(task.feature_expert)
    whole = read_losses(place.losses, "test", WHOLE, task.metric) if _probes(protocol, len(experts)) else None
    known = [read_losses(place.losses, split, protocol, task.metric) for split in ROUTER_SPLITS]
    label = fit_domain_label(known, _generalist(recipe))
    return answer(
        test,
        task.features("test", protocol),
        routers,
        predictions=predictions,
        cascade=cascade,
        whole=whole,
        labelled=None if label is None else label.choice(test[task.metric]),
        policy=_policy(recipe, protocol),
        runs_first=runs_first,
        advance=advance,
    )


def _generalist(recipe: Recipe) -> int | None:
    """The number of the expert that everything falls back to; None where there are no specialists."""
    names = [expert.name for expert in recipe.experts]
    return None if recipe.generalist is None else names.index(recipe.generalist)


def _probes(protocol: str, experts: int) -> bool:
    """Whether there is something to probe with: the first of several tokens, and more than one expert."""
    return experts > 1 and (visible_tokens(protocol) or 0) > 1


def _policy(recipe: Recipe, protocol: str) -> Policy:
    """The mixture's policy under a protocol: where the whole sample is scored nothing comes before it to probe."""
    policy = recipe.router.policy
    return "route" if policy == "probe" and not _probes(protocol, len(recipe.experts)) else policy


def _summary(expert: Expert, facts: ExpertFacts) -> ExpertSummary:
    certificate = facts.certificate
    return ExpertSummary(
        expert.method or "checkpoint",
        expert.scheme or "as stored",
        facts.bytes_on_disk,
        float(certificate.get("substituted_share", 0.0)),
        certificate.get("bits_per_weight"),
    )


def _linked_twice(place: MixtureFolder) -> int:
    """Bytes of shared files that experts link to, which a sum over both folders would count twice."""
    inodes = {path.stat().st_ino for path in (place.path / "experts").rglob("*") if path.is_file()}
    return sum(path.stat().st_size for path in place.shared.rglob("*") if path.stat().st_ino in inodes)
