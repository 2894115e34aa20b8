"""Routers and a cascade, fitted to simulated images whose class a feature shows."""

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from moqe.errors import DataError, RecipeError
from moqe.evaluate import judge
from moqe.evaluate.routing import JUDGING_STEPS, ROUTERS, FittedRouters, RoutingData, answer, fit_routers
from moqe.progress import Silent
from moqe.recipe import Router
from moqe.router import Cascade, VectorFeatures, choose
from moqe.router.baselines import Constant

Images = Callable[..., Any]
OPTIONS = Router(epochs=1, max_cost=1.2)


def features_of(images: Any, seed: int = 0) -> VectorFeatures:
    """The class with a little noise."""
    label = torch.from_numpy(images.predictions.label)
    noise = torch.randn(len(label), 6, generator=torch.Generator().manual_seed(seed))
    return VectorFeatures(torch.nn.functional.one_hot(label, 6) + 0.1 * noise)


def data_of(images: Any) -> RoutingData:
    return RoutingData(images.tables["cross_entropy"], images.tables["top1"], features_of(images), images.predictions)


@pytest.fixture(scope="module")
def quiet() -> Silent:
    return Silent()


def test_examples_are_costs(simulated_images: Images) -> None:
    images = simulated_images(0, n=20)
    data = data_of(images)
    assert np.array_equal(data.examples.losses.numpy(), images.tables["cross_entropy"].loss)
    assert np.array_equal(data.examples.deciding.numpy(), 1 - images.tables["top1"].loss)
    zero_one = replace(data, losses=images.tables["top1"]).examples
    assert zero_one.judged is None
    assert np.array_equal(zero_one.losses.numpy(), 1 - images.tables["top1"].loss)


def test_from_losses_to_a_verdict(simulated_images: Images, quiet: Silent) -> None:
    train, validation, test = (simulated_images(seed, n=400) for seed in range(3))
    fitted = fit_routers(data_of(train), data_of(validation), OPTIONS, "image", 0, quiet)
    assert set(fitted.routers) == set(ROUTERS)
    assert fitted.cascade is not None
    steps: list[int] = []
    answers = answer(
        test.tables,
        features_of(test),
        fitted.routers,
        predictions=test.predictions,
        cascade=fitted.cascade.cascade,
        policy="cascade",
        advance=steps.append,
    )
    assert sum(steps) == JUDGING_STEPS
    assert answers.outcomes["mixture"] is answers.outcomes["cascade"]
    assert answers.predicted.shape == (400, 3)
    found = judge(test.tables, validation.tables["top1"], answers.outcomes, 0, 200, policy="cascade")
    assert found.policies["route"].value > found.experts[found.best_single]
    assert found.wins
    assert 1.0 <= found.cost <= 1.25
    plain = answer(test.tables, features_of(test), fitted.routers)
    assert set(plain.outcomes) == {"mixture", "paper", "tuned", "constant", "linear", "knn", "logistic"}
    assert np.array_equal(plain.outcomes["mixture"].asked, answers.outcomes["route"].asked)


def test_what_routers_see_is_paid_for_unless_nobody_looks(simulated_images: Images, quiet: Silent) -> None:
    images = simulated_images(0, n=200)
    fitted = fit_routers(data_of(images), data_of(simulated_images(1, n=200)), OPTIONS, "image", 0, quiet)

    best = int(fitted.routers["constant"].predict(features_of(images))[0].argmin())

    def costs(routers: dict[str, Any], cascade: Cascade) -> dict[str, float]:
        found = answer(
            images.tables,
            features_of(images),
            routers,
            predictions=images.predictions,
            cascade=cascade,
            runs_first=(best + 1) % 3,
        )
        return {name: outcome.mean_cost for name, outcome in found.outcomes.items()}

    routers = dict(fitted.routers)
    never = Cascade(0.0, (1, 2, 0))
    seen = costs(routers, never)
    assert seen["constant"] == 1.0
    assert seen["knn"] > 1.0
    assert seen["route"] == seen["cascade"] > 1.0
    assert costs(routers, Cascade(0.0, (1, 2, 0), always_first=best))["cascade"] == 1.0
    constant = routers["constant"]
    assert isinstance(constant, Constant)
    routers["mixture"] = constant
    assert costs(routers, never)["route"] == costs(routers, never)["cascade"] == 1.0


def test_a_cascade_needs_two_experts(simulated_images: Images, quiet: Silent) -> None:
    train, validation = (simulated_images(seed, n=60, experts=("only",)) for seed in range(2))
    fitted = fit_routers(data_of(train), data_of(validation), OPTIONS, "image", 0, quiet)
    assert fitted.cascade is None
    with pytest.raises(RecipeError, match="two experts"):
        fit_routers(
            data_of(train), data_of(validation), OPTIONS.model_copy(update={"policy": "cascade"}), "image", 0, quiet
        )


def test_too_few_images_for_a_cascade_stop_only_who_wants_one(
    simulated_images: Images, quiet: Silent, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "moqe")
    train = data_of(simulated_images(0, n=40))

    def fit(images: int, policy: str) -> FittedRouters:
        options = OPTIONS.model_copy(update={"preset": "paper", "policy": policy})
        return fit_routers(train, data_of(simulated_images(1, n=images)), options, "image", 0, quiet)

    assert fit(10, "route").cascade is not None
    assert not caplog.records
    assert fit(9, "route").cascade is None
    (record,) = caplog.records
    assert record.getMessage() == (
        "no cascade to compare with: it needs 10 images that are new to the router, and there are 9"
    )
    with pytest.raises(DataError, match="needs at least 10 samples new to the router, and there are 9"):
        fit(9, "cascade")


def test_a_generalist_is_what_everything_falls_back_to(simulated: Callable[..., Any], quiet: Silent) -> None:
    """Domains show in the features; what is like none of them goes to the generalist, which is not the best expert."""

    def data(seed: int, shift: float = 0.0) -> RoutingData:
        table = simulated(seed, documents=60)
        domain = torch.from_numpy(make_number(table.domain))
        noise = torch.randn(len(domain), 6, generator=torch.Generator().manual_seed(seed))
        return RoutingData(table, table, VectorFeatures(torch.nn.functional.one_hot(domain, 6) + 0.1 * noise + shift))

    train, validation, strange = data(0), data(1), data(2, shift=3.0).features
    fitted = fit_routers(train, validation, Router(epochs=1), "image", 0, quiet, fallback=1)
    assert fitted.selection["generalist"] == "gptq"
    assert fitted.selection["paper"]["novelty"] is None
    assert 0.0 <= fitted.selection["tuned"]["novelty"]["novel"] < 0.1
    for name in ("mixture", "unguarded", "tuned", "linear", "knn", "logistic"):
        assert set(choose(fitted.routers[name].predict(strange)).tolist()) == {1}, name
        assert len(set(choose(fitted.routers[name].predict(validation.features)).tolist())) == 3, name
    today = fit_routers(train, validation, Router(epochs=1), "image", 0, quiet)
    assert today.selection["generalist"] is None
    assert today.selection["tuned"]["novelty"] is None
    assert len(set(choose(today.routers["linear"].predict(strange)).tolist())) > 1


def make_number(names: np.ndarray) -> np.ndarray:
    """Labels as numbers, in sorted order."""
    return np.unique(names, return_inverse=True)[1]
