from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from moqe.data.classification import class_values
from moqe.errors import ProtocolError
from moqe.evaluate.outcome import cascaded, routed
from moqe.router import Cascade

Images = Callable[..., Any]


def test_routing_by_hand(simulated_images: Images) -> None:
    images = simulated_images(0, n=5)
    choice = np.array([0, 2, 1, 1, 0])
    outcome = routed(images.tables, choice)
    for name, table in images.tables.items():
        assert outcome.values[name].tolist() == [table.loss[i, e] for i, e in enumerate(choice)]
    assert outcome.cost.tolist() == [1.0] * 5
    assert outcome.share.tolist() == [0.4, 0.4, 0.2]
    part = outcome.select(np.array([1, 2]))
    assert (len(part), part.share.tolist()) == (2, [0, 0.5, 0.5])


def test_an_expert_whose_features_the_router_sees_is_paid_for(simulated_images: Images) -> None:
    outcome = routed(simulated_images(0, n=4).tables, np.array([0, 1, 2, 1]), runs_first=1)
    assert outcome.cost.tolist() == [2, 1, 2, 1]
    assert outcome.share.tolist() == [0.25, 0.5, 0.25]  # it answers no more often


def test_a_choice_that_does_not_fit_is_refused(simulated_images: Images) -> None:
    tables = simulated_images(0, n=4).tables
    for choice in (np.zeros(3, np.int64), np.full(4, 3), np.full(4, -1)):
        with pytest.raises(ProtocolError, match="route these samples again"):
            routed(tables, choice)


def test_two_answers_are_averaged_where_the_second_is_asked(simulated_images: Images) -> None:
    images = simulated_images(1)
    choice = np.arange(300) % 3
    answer = Cascade(0.6, (1, 2, 0)).answer(
        torch.from_numpy(choice), torch.from_numpy(images.predictions.probabilities)
    )
    used = answer.second_used.numpy()
    assert 0 < used.sum() < 300
    outcome, alone = cascaded(images.tables, images.predictions, answer), routed(images.tables, choice)
    probabilities = np.exp(images.predictions.log_probabilities.astype(np.float64))
    rows = np.arange(300)
    mean = (probabilities[rows, choice] + probabilities[rows, (choice + 1) % 3]) / 2
    expected = class_values(np.log(mean), images.predictions.label)
    for name, values in outcome.values.items():
        assert np.array_equal(values[~used], alone.values[name][~used])
        assert np.allclose(values[used], expected[name][used], atol=1e-6)
    assert np.array_equal(outcome.cost, 1.0 + used)
    assert np.array_equal(outcome.asked.sum(1), 1.0 + used)
    assert outcome.share.sum() == pytest.approx(outcome.mean_cost)


def test_a_second_expert_that_ran_already_costs_nothing_more(simulated_images: Images) -> None:
    images = simulated_images(1, n=40)
    answer = Cascade(1.0, (1, 2, 0)).answer(
        torch.zeros(40, dtype=torch.int64), torch.from_numpy(images.predictions.probabilities)
    )
    assert set(cascaded(images.tables, images.predictions, answer, runs_first=1).cost) == {2.0}
    assert set(cascaded(images.tables, images.predictions, answer, runs_first=2).cost) == {3.0}


def test_a_cascade_that_never_asks_is_the_route(simulated_images: Images) -> None:
    images = simulated_images(2)
    choice = np.arange(300) % 3
    answer = Cascade(0.0, (1, 2, 0)).answer(
        torch.from_numpy(choice), torch.from_numpy(images.predictions.probabilities)
    )
    outcome, alone = cascaded(images.tables, images.predictions, answer), routed(images.tables, choice)
    assert all(np.array_equal(values, alone.values[name]) for name, values in outcome.values.items())
    assert np.array_equal(outcome.cost, alone.cost)


def test_an_expert_that_always_answers_first_replaces_the_choice(simulated_images: Images) -> None:
    images = simulated_images(2)
    answer = Cascade(0.0, (1, 2, 0), always_first=2).answer(
        torch.zeros(300, dtype=torch.int64), torch.from_numpy(images.predictions.probabilities)
    )
    outcome = cascaded(images.tables, images.predictions, answer)
    assert outcome.share.tolist() == [0, 0, 1]
    assert np.array_equal(outcome.values["top1"], images.tables["top1"].loss[:, 2])


def test_nothing_is_impossible(scored_images: Images) -> None:
    sure = np.array([[[0.0, 1e5], [0.0, 1e5]]])
    images = scored_images(sure, sure[:, 0], [0], ("a", "b"))
    answer = Cascade(1.0, (1, 0)).answer(
        torch.zeros(1, dtype=torch.int64), torch.from_numpy(images.predictions.probabilities)
    )
    outcome = cascaded(images.tables, images.predictions, answer)
    assert outcome.values["cross_entropy"][0] == pytest.approx(87.3, abs=0.1)
    assert outcome.values["top1"].tolist() == [0]
