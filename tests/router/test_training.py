from dataclasses import replace

import pytest
import torch

from moqe.errors import NumericalError, RecipeError
from moqe.recipe import Balance
from moqe.router import choose, realised_losses
from moqe.router.objectives import OBJECTIVES
from moqe.router.text_network import TextNetwork
from moqe.router.training import TrainingOptions, cosine, train_network

OPTIONS = TrainingOptions("expected_loss", 6, 16, 1, 3e-3, 0.01, balance=None)


def network() -> TextNetwork:
    return TextNetwork(16, 3, layers=1)


def train(examples, validation, options, seed=0, epoch_done=None):
    return train_network(network, examples, validation, options, seed, "test", epoch_done)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_learns_a_planted_signal(planted, objective):
    test = planted(120, 0.1, 3)
    router, history = train(planted(120, 0.1, 1), planted(40, 0.1, 2), replace(OPTIONS, objective=objective))
    assert history[-1].objective < history[0].objective
    assert router.unit == ("nats" if objective == "centred_regression" else "logit")
    value = float(realised_losses(test.losses, choose(router.predict(test.features))).mean())
    assert value < float(test.losses[:, test.best_single].mean()) - 0.03  # of the 0.067 that the cluster is worth


def test_balance_learns_too_and_its_bias_is_frozen_into_the_router(planted):
    options = replace(OPTIONS, objective="cross_entropy", balance=Balance(temperature=2.0), epochs=8)
    test = planted(120, 0.1, 3)
    router, _ = train(planted(120, 0.1, 1), planted(40, 0.1, 2), options)
    assert router.bias.shape == (3,)
    assert (router.bias <= 0).all()
    assert (router.bias < 0).any()
    logits = router.network(test.features.batch(torch.arange(len(test))))
    torch.testing.assert_close(router.predict(test.features), -(logits + router.bias) / 2.0)
    constant = float(test.losses[:, test.best_single].mean())
    assert float(realised_losses(test.losses, choose(router.predict(test.features))).mean()) < constant - 0.02


def test_predictions_of_a_regression_are_nats(planted):
    examples = planted(120, 0.3, 1, noise=0.0)
    router, _ = train(examples, examples, replace(OPTIONS, objective="centred_regression", epochs=15))
    error = router.predict(examples.features) - examples.centred
    assert float(error.square().mean().sqrt()) < 0.5 * float(examples.centred.square().mean().sqrt())


def test_two_trainings_agree_to_the_last_bit_and_leave_the_callers_randomness_alone(planted):
    options = replace(OPTIONS, objective="cross_entropy", balance=Balance(), epochs=2)
    torch.manual_seed(77)
    before = torch.random.get_rng_state()
    one, history = train(planted(40, 0.1, 1), planted(20, 0.1, 2), options)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(78)
    two, again = train(planted(40, 0.1, 1), planted(20, 0.1, 2), options)
    other, _ = train(planted(40, 0.1, 1), planted(20, 0.1, 2), options, seed=1)
    assert history == again
    assert all(torch.equal(one.tensors()[name], two.tensors()[name]) for name in one.tensors())
    assert not torch.equal(one.tensors()["network.head.0.weight"], other.tensors()["network.head.0.weight"])


def test_the_best_epoch_is_kept_and_patience_ends_training(planted):
    """A rate this high makes later epochs worse than some earlier one."""
    validation = planted(40, 0.1, 2)
    epochs: list[int] = []
    options = replace(OPTIONS, learning_rate=0.05, epochs=30, patience=2)
    router, history = train(planted(60, 0.1, 1), validation, options, epoch_done=epochs.append)
    value = float(realised_losses(validation.losses.double(), choose(router.predict(validation.features))).mean())
    losses = [epoch.validation_loss for epoch in history]
    assert value == pytest.approx(min(losses), abs=1e-12)
    assert len(epochs) == len(history) < 30
    assert min(losses[-2:]) > min(losses)


def test_products_may_be_rounded_in_training_and_weights_are_not(planted):
    test = planted(120, 0.1, 3)
    examples, validation = planted(120, 0.1, 1), planted(40, 0.1, 2)
    exact, _ = train(examples, validation, OPTIONS)
    rounded, _ = train(examples, validation, replace(OPTIONS, precision="bfloat16"))
    first, other = (next(router.network.encoder.parameters()) for router in (exact, rounded))
    assert other.dtype == torch.float32
    assert not torch.equal(first, other)
    predicted = rounded.predict(test.features)
    assert predicted.dtype == torch.float32
    value = float(realised_losses(test.losses, choose(predicted)).mean())
    assert value < float(test.losses[:, test.best_single].mean()) - 0.03


def test_cosine_goes_from_one_to_zero():
    factor = cosine(10)
    assert factor(0) == 1.0
    assert factor(5) == pytest.approx(0.5)
    assert factor(10) == pytest.approx(0.0)


def test_experts_that_are_all_equal_are_no_problem(planted):
    examples = planted(20, 0.0, 1, noise=0.0)
    router, _ = train(examples, examples, replace(OPTIONS, objective="centred_regression", epochs=1))
    assert torch.isfinite(router.predict(examples.features)).all()


def test_diverging_is_an_error(planted):
    examples = planted(20, 0.1, 1)
    with pytest.raises(NumericalError, match=r"lower router\.learning_rate"):
        train(examples, examples, replace(OPTIONS, objective="centred_regression", learning_rate=1e30))


def test_regression_has_no_gate_to_balance(planted):
    examples = planted(20, 0.1, 1)
    with pytest.raises(RecipeError, match="centred_regression"):
        train(examples, examples, replace(OPTIONS, objective="centred_regression", balance=Balance()))


def test_epochs_are_judged_by_what_judges(planted):
    validation = replace(planted(40, 0.1, 2), judged=torch.arange(120.0).reshape(40, 3))
    router, history = train(planted(40, 0.1, 1), validation, replace(OPTIONS, epochs=2))
    judged = realised_losses(validation.deciding.double(), choose(router.predict(validation.features)))
    assert min(epoch.validation_loss for epoch in history) == pytest.approx(float(judged.mean()))
    assert float(judged.mean()) > 10  # the losses are about 3
