import pytest
import torch

from moqe.router import choose, fit_baselines, realised_losses
from moqe.router.examples import RoutingExamples
from moqe.router.features import TokenFeatures
from moqe.router.knn import Knn, fit_knn
from moqe.router.linear import Linear, fit_linear
from moqe.router.standardiser import fit_standardiser


def realised(router, examples) -> float:
    return float(realised_losses(examples.losses, choose(router.predict(examples.features))).mean())


def test_learning_baselines_find_a_planted_signal_and_the_others_do_not(planted):
    train, validation, test = planted(160, 0.1, 1), planted(60, 0.1, 2), planted(200, 0.1, 3)
    routers = fit_baselines(train, validation, seed=0)
    value = {name: realised(router, test) for name, router in routers.items()}
    for name in ("linear", "knn", "logistic"):
        assert value[name] < value["constant"] - 0.04  # of the 0.067 that knowing the cluster is worth
    mean = float(test.losses.mean())
    assert value["random"] == pytest.approx(mean, abs=0.02)
    assert value["uniform"] == pytest.approx(mean, abs=0.02)


def test_constant_takes_the_best_on_its_training_set(planted):
    train = planted(40, 0.0, 4)
    constant = fit_baselines(train, train, 0)["constant"]
    assert set(choose(constant.predict(train.features)).tolist()) == {train.best_single}
    torch.testing.assert_close(constant.predict(train.features)[7], train.centred.mean(0).float())


def test_random_is_seeded_and_uniform_takes_turns(planted):
    train = planted(300, 0.0, 5)
    one, two = fit_baselines(train, train, 1), fit_baselines(train, train, 2)
    first, again = one["random"].predict(train.features), one["random"].predict(train.features)
    assert torch.equal(first, again)
    assert not torch.equal(first, two["random"].predict(train.features))
    assert choose(one["uniform"].predict(train.features)).bincount().tolist() == [100, 100, 100]


def test_ridge_solves_its_normal_equations(planted):
    train = planted(40, 0.1, 6)
    router = fit_linear(train, planted(20, 0.1, 7))
    x = router.standardise(train.features.pooled())
    target = train.centred - train.centred.mean(0)
    left = x.T @ x + len(train) * router.strength * torch.eye(x.shape[1], dtype=torch.float64)
    torch.testing.assert_close(left @ router.weight, x.T @ target, atol=1e-8, rtol=1e-8)


def test_without_a_signal_strong_shrinkage_is_chosen(planted):
    linear, knn = (fit(planted(160, 0.0, 8), planted(200, 0.0, 9)) for fit in (fit_linear, fit_knn))
    assert linear.strength >= 10.0
    assert knn.neighbours >= 64


def test_knn_with_one_neighbour_remembers():
    embedding = torch.eye(4)
    examples = RoutingExamples(
        TokenFeatures(torch.tensor([[0, 0], [1, 1], [2, 2]]), embedding),
        torch.tensor([[1.0, 2.0], [2.0, 1.0], [0.0, 4.0]]),
        ("a", "b", "c"),
    )
    router = fit_knn(examples, examples)
    assert router.neighbours == 1
    torch.testing.assert_close(router.predict(examples.features), examples.centred.float())
    everything = Knn(router.standardise, router.keys, router.values, 3)
    torch.testing.assert_close(everything.predict(examples.features)[1], examples.centred.float().mean(0))


def test_refitting_keeps_the_choice_made_on_validation(planted):
    train, validation = planted(60, 0.1, 10), planted(30, 0.1, 11)
    pool = train.join(validation)
    linear, knn = fit_linear(train, validation), fit_knn(train, validation)
    assert linear.refit(pool).strength == linear.strength
    assert knn.refit(pool).neighbours == knn.neighbours
    assert len(knn.refit(pool).keys) == 90
    assert isinstance(linear.refit(pool), Linear)


def test_a_dimension_that_does_not_vary_is_only_centred():
    x = torch.tensor([[1.0, 5.0], [3.0, 5.0]])
    standard = fit_standardiser(x)(x)
    torch.testing.assert_close(standard, torch.tensor([[-1.0, 0.0], [1.0, 0.0]], dtype=torch.float64))
