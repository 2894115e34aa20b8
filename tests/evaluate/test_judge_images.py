from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from moqe.errors import ProtocolError
from moqe.evaluate import judge, mcnemar
from moqe.evaluate.judge import best_per_sample
from moqe.evaluate.metrics import METRICS
from moqe.evaluate.outcome import Outcome, cascaded, routed
from moqe.router import Cascade

Images = Callable[..., Any]
TOP1 = METRICS["top1"]


def by_label(images: Any) -> np.ndarray:
    """What a router that knows the class chooses."""
    return images.predictions.label % len(images.predictions.experts)


def outcomes_of(images: Any, threshold: float = 0.0) -> dict[str, Outcome]:
    """The mixture knows the class; with a threshold it is a cascade on top of that."""
    choice = by_label(images)
    route = routed(images.tables, choice)
    answer = Cascade(threshold, (1, 2, 0)).answer(
        torch.from_numpy(choice), torch.from_numpy(images.predictions.probabilities)
    )
    cascade = cascaded(images.tables, images.predictions, answer)
    constant = routed(images.tables, np.zeros_like(choice))
    return {"mixture": cascade, "route": route, "cascade": cascade, "constant": constant, "knn": constant}


def test_every_number_by_hand(scored_images: Images) -> None:
    # classes 0, 1, 0, 1; expert a is right on samples 0 and 1, expert b on 1 and 2; nobody is on 3
    right, wrong = [3.0, 0.0], [0.0, 1.0]
    logits = np.array([[right, wrong], [wrong, wrong], [wrong, right], [right, [1.0, 0.0]]])
    images = scored_images(logits, np.array([right, wrong, right, wrong]), [0, 1, 0, 1], ("a", "b"))
    validation = images.tables["top1"].select(np.array([0]))
    outcomes = {"mixture": routed(images.tables, np.array([0, 0, 1, 1]))}
    found = judge(images.tables, validation, outcomes, 0, 200)
    assert (found.base, found.experts) == (1.0, {"a": 0.5, "b": 0.5})
    assert (found.best_single, found.mixture.value, found.oracle) == ("a", 0.75, 0.75)
    assert found.difference.value == 0.25
    assert found.split_half_oracle is None
    assert found.split_half_gap is None
    assert found.oracle_gap.value == 0.25
    assert (found.n_samples, found.n_documents, found.n_units) == (4, 4, 4)
    lines = {line.name: line for line in found.lines}
    # on sample 3 both are wrong, and b is less sure of it
    nats = [np.log1p(np.exp(-3)), np.log1p(np.exp(-1)), np.log1p(np.exp(-3)), np.log1p(np.exp(1))]
    assert lines["oracle"].also == pytest.approx({"top5": 1.0, "cross_entropy": np.mean(nats)})
    assert lines["mixture"].also == lines["oracle"].also
    assert lines["a"].also["cross_entropy"] == pytest.approx(
        np.mean([nats[0], nats[1], np.log1p(np.exp(1)), np.log1p(np.exp(3))])
    )
    assert lines["random"].value == 0.5
    assert [line.name for line in found.lines] == ["base", "a", "b", "mixture", "random", "uniform", "oracle"]
    assert all(line.perplexity is None and line.bits_per_byte is None for line in found.lines)
    assert [(row.domain, row.n_samples, row.mixture, row.oracle) for row in found.domains] == [
        ("class 0", 2, 1.0, 1.0),
        ("class 1", 2, 0.5, 0.5),
    ]


def test_differences_are_tested_by_mcnemar(simulated_images: Images) -> None:
    images = simulated_images(0, n=900)
    found = judge(images.tables, images.tables["top1"], outcomes_of(images), 0, 200)
    top1 = images.tables["top1"]
    reference = top1.loss[:, top1.experts.index(found.best_single)] == 1
    mixture = routed(images.tables, by_label(images)).values["top1"] == 1
    assert found.difference.p == mcnemar(reference, mixture)
    assert found.difference_to_base.p == mcnemar(top1.base == 1, mixture)
    for row in found.domains:
        of_class = top1.domain == row.domain
        assert row.difference.p == mcnemar(reference[of_class], mixture[of_class])
    lines = {line.name: line for line in found.lines}
    assert lines["oracle"].difference is not None
    assert lines["oracle"].difference.p == mcnemar(reference, top1.loss.max(1) == 1)
    assert lines["random"].difference is not None
    assert lines["random"].difference.p is None  # expected values are neither right nor wrong


def test_images_of_one_document_are_not_independent(simulated_images: Images) -> None:
    images = simulated_images(0)
    pairs = {
        name: replace(table, document=np.asarray([f"film-{i // 2}" for i in range(300)]))
        for name, table in images.tables.items()
    }
    found = judge(pairs, pairs["top1"], outcomes_of(images), 0, 200)
    alone = judge(images.tables, images.tables["top1"], outcomes_of(images), 0, 200)
    assert found.difference.value == alone.difference.value
    assert found.difference.p != alone.difference.p
    assert "150 documents" in found.sentence


def test_a_router_that_knows_the_class_wins_in_points(simulated_images: Images) -> None:
    images = simulated_images(0, n=600)
    found = judge(images.tables, images.tables["top1"], outcomes_of(images), 0, 500)
    assert found.wins
    points = f"{100 * found.difference.value:.2f}"
    assert f"The mixture wins by {points} points of top-1 accuracy over {found.best_single}" in found.sentence
    assert f"(difference +{points} [+" in found.sentence
    assert "600 images)" in found.sentence


def test_a_cascade_states_its_cost(simulated_images: Images) -> None:
    images = simulated_images(1, n=600)
    outcomes = outcomes_of(images, threshold=0.5)
    found = judge(images.tables, images.tables["top1"], outcomes, 0, 200, policy="cascade")
    used = float(outcomes["cascade"].cost.mean() - 1)
    assert 0 < used < 1
    assert found.cost == found.mixture.cost == pytest.approx(1 + used)
    assert found.policy == "cascade"
    assert set(found.policies) == {"route", "cascade"}
    assert set(found.routers) == {"constant", "knn"}
    assert (found.policies["route"].cost, found.policies["cascade"]) == (1.0, found.mixture)
    assert sum(found.mixture.share.values()) == pytest.approx(1 + used)
    assert f"600 images, {1 + used:.3f} forward passes per image" in found.sentence
    lines = [(line.kind, line.name, line.cost) for line in found.lines]
    assert lines[4:8] == [
        ("mixture", "mixture", pytest.approx(1 + used)),
        ("policy", "route", 1.0),
        ("policy", "cascade", pytest.approx(1 + used)),
        ("no skill", "constant", 1.0),
    ]
    costs = {line.name: line.cost for line in found.lines}
    assert (costs["uniform"], costs["random"], costs["oracle"]) == (1.0, 1.0, 3.0)
    values = images.tables["top1"].loss.mean(0)
    assert min(values) <= {line.name: line.value for line in found.lines}["uniform"] <= max(values)


def test_the_curve_shows_where_the_cascade_stands(simulated_images: Images) -> None:
    images = simulated_images(1)
    outcomes = outcomes_of(images, threshold=0.5)
    predicted = images.tables["cross_entropy"].loss
    found = judge(images.tables, images.tables["top1"], outcomes, 0, 100, predicted=predicted)
    assert found.curve is not None
    best = images.tables["top1"].experts.index(found.best_single)
    alone = (outcomes["mixture"].asked == np.eye(3)[best]).all(1)
    assert found.curve.deployed_share == pytest.approx(1 - alone.mean())
    assert found.curve.deployed_value == pytest.approx(found.mixture.value)
    assert max(found.curve.oracle) == pytest.approx(found.oracle)


def test_asking_the_best_expert_only_is_said_so(simulated_images: Images) -> None:
    images = simulated_images(0)
    best = int(images.tables["top1"].loss.sum(0).argmax())
    outcomes = {"mixture": routed(images.tables, np.full(300, best))}
    found = judge(images.tables, images.tables["top1"], outcomes, 0, 100)
    assert (
        f"every sample goes to {images.predictions.experts[best]}, the best single expert (300 images)"
        in found.sentence
    )


def test_the_oracle_takes_whoever_is_right_and_then_the_surest(simulated_images: Images) -> None:
    tables = simulated_images(3).tables
    choice = best_per_sample(tables, TOP1)
    rows = np.arange(300)
    assert np.array_equal(tables["top1"].loss[rows, choice], tables["top1"].loss.max(1))
    surest = tables["cross_entropy"].loss.argmin(1)
    nobody, everybody = tables["top1"].loss.max(1) == 0, tables["top1"].loss.min(1) == 1
    assert nobody.any()
    assert np.array_equal(choice[nobody | everybody], surest[nobody | everybody])


def test_halves_of_a_test_can_be_judged(simulated_images: Images) -> None:
    images = simulated_images(4)
    half = np.random.default_rng(0).permutation(300)[:150]
    part = images.select(half)
    outcomes = {name: one.select(half) for name, one in outcomes_of(images, 0.5).items()}
    again = outcomes_of(part, 0.5)
    for name, outcome in outcomes.items():
        assert np.array_equal(outcome.cost, again[name].cost)
        assert all(np.array_equal(outcome.values[metric], again[name].values[metric]) for metric in outcome.values)
    found = judge(part.tables, part.tables["top1"], outcomes, 0, 100)
    assert found.n_samples == 150


def test_tables_that_do_not_belong_together_are_refused(simulated_images: Images) -> None:
    images, others = simulated_images(0), simulated_images(0, n=200)
    outcomes, validation = outcomes_of(images), images.tables["top1"]
    with pytest.raises(ProtocolError, match="top5 and top1 are of other samples"):
        judge(images.tables | {"top5": others.tables["top5"]}, validation, outcomes, 0, 100)
    with pytest.raises(ProtocolError, match="the validation losses are top1 and the test losses top5"):
        judge({"top5": images.tables["top5"]}, validation, outcomes, 0, 100)
    with pytest.raises(ProtocolError, match="knn answered 200 samples"):
        judge(images.tables, validation, outcomes | {"knn": outcomes_of(others)["knn"]}, 0, 100)
    fewer = {"mixture": replace(outcomes["mixture"], values={"top1": outcomes["mixture"].values["top1"]})}
    with pytest.raises(ProtocolError, match="route the test samples again"):
        judge(images.tables, validation, fewer, 0, 100)
