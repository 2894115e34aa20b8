import json
import logging
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from moqe.errors import DataError, RecipeError
from moqe.recipe import Balance
from moqe.recipe import Router as Options
from moqe.router import (
    GuardedRouter,
    RoutingExamples,
    VectorFeatures,
    choose,
    fit_paper,
    fit_tuned,
    guard,
    load_router,
    realised_losses,
    save_router,
)
from moqe.router import presets as module
from moqe.router.baselines import Constant
from moqe.router.guard import GuardDecision
from moqe.router.network_router import NetworkRouter
from moqe.router.selection import better
from moqe.router.training import TrainingOptions
from moqe.router.uncertainty import ClusteredMean


def images(n: int, signal: float, seed: int, dimension: int = 16) -> RoutingExamples:
    """Planted vectors: their largest of the first three numbers tells which expert is best, by `signal` nats."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(n, dimension, generator=generator)
    losses = 1.0 + 0.3 * torch.randn(n, 1, generator=generator) + 0.03 * torch.randn(n, 3, generator=generator)
    losses[torch.arange(n), vectors[:, :3].argmax(1)] -= signal
    return RoutingExamples(VectorFeatures(vectors), losses, tuple(f"{seed}-{i}" for i in range(n)))


def realised(router, examples) -> float:
    return float(realised_losses(examples.losses, choose(router.predict(examples.features))).mean())


class Recorder:
    def __init__(self) -> None:
        self.steps: dict[str, list[int]] = {}

    @contextmanager
    def track(self, what, total):
        done = self.steps.setdefault(what, [0, total])

        def advance(steps):
            done[0] += steps

        yield advance


def test_paper_learns_a_planted_signal_with_the_papers_network(planted):
    train, validation, test = planted(96, 0.2, 1), planted(48, 0.2, 2), planted(120, 0.2, 3)
    progress = Recorder()
    options = Options(preset="paper", learning_rate=2e-3)
    fitted = fit_paper(options, train, validation, 0, progress=progress)
    assert isinstance(fitted.unguarded, NetworkRouter)
    assert fitted.unguarded.network.options == {
        "dimension": 16, "experts": 3, "layers": 2, "heads": 4, "dropout": 0.1,
        "max_tokens": 512, "width": None, "segment": 1,
    }  # fmt: skip
    assert len(fitted.history) == 10
    assert progress.steps == {"train the paper's router": [10, 10]}
    assert fitted.guard is not None
    assert fitted.guard.kept
    assert isinstance(fitted.router, GuardedRouter)
    assert realised(fitted.router, test) < float(test.losses[:, validation.best_single].mean()) - 0.05


def test_the_papers_numbers():
    training = module.PAPER["text"].training
    assert (training.objective, training.batch_size, training.accumulation) == ("cross_entropy", 8, 6)
    assert (training.learning_rate, training.weight_decay) == (5e-5, 0.01)
    balance = Options(preset="paper").balance
    assert (balance.usage_decay, balance.bias_strength, balance.noise_scale, balance.temperature) == (
        0.8,
        0.8,
        1.0,
        1.0,
    )


def test_tuned_finds_a_planted_signal_and_says_what_it_compared(planted):
    train, validation, test = planted(96, 0.2, 1), planted(32, 0.2, 2), planted(120, 0.2, 3)
    progress = Recorder()
    fitted = fit_tuned(Options(epochs=4), train, validation, 0, progress=progress)
    networks = ["network-cross_entropy", "network-expected_loss", "network-centred_regression"]
    names = ["linear", "knn", "logistic", *networks]
    assert [candidate.name for candidate in fitted.candidates] == names
    assert {candidate.compared for candidate in fitted.candidates} == {6}
    assert progress.steps == {"compare routers": [24, 24]}
    assert fitted.chosen == min(fitted.candidates, key=lambda candidate: candidate.loss).name
    assert fitted.guard is not None
    assert fitted.guard.kept
    assert realised(fitted.router, test) < float(test.losses[:, validation.best_single].mean()) - 0.05
    described = json.loads(json.dumps(fitted.to_json(), allow_nan=False))
    assert [row["name"] for row in described["candidates"]] == names
    assert described["guard"]["gain"]["documents"] == 32


def test_a_domain_of_two_documents_is_no_obstacle(planted):
    """Where one is judged on and the other chooses the strength, training knows the other domain alone."""
    examples = planted(96, 0.2, 1)
    short = dict.fromkeys(examples.document[88:96])  # the last two documents
    label = tuple("books" if name in short else "web" for name in examples.document)
    assert len(short) == 2
    train, validation = (replace(examples, label=label).select(torch.arange(*ends)) for ends in ((0, 64), (64, 96)))
    for seed in range(4):
        fitted = fit_tuned(Options(epochs=1), train, validation, seed)
        assert "domain-classifier" in [candidate.name for candidate in fitted.candidates]


class Knowing:
    """A stand-in for the paper's router: it sees the losses themselves, blurred by noise."""

    name, unit = "paper", "logit"

    def __init__(self, examples: RoutingExamples, noise: float) -> None:
        self.costs = examples.losses + noise * torch.randn(examples.losses.shape, generator=torch.manual_seed(0))

    def predict(self, features) -> torch.Tensor:
        return self.costs


def test_the_papers_router_is_taken_where_it_beats_the_winner_on_validation(planted):
    train, validation = planted(96, 0.15, 1, noise=0.1), planted(48, 0.15, 2, noise=0.1)
    options = Options(epochs=1)
    taken = fit_tuned(options, train, validation, 0, paper=Knowing(validation, 0.0))
    assert taken.chosen == "paper"
    assert isinstance(taken.unguarded, Knowing)
    assert taken.unseen.rows.tolist() == list(range(96, 144))
    assert [candidate.name for candidate in taken.candidates][-1] == "paper"
    assert {candidate.compared for candidate in taken.candidates} == {7}
    assert taken.candidates[-1].gain.documents == 12
    assert taken.guard is not None
    realised = validation.losses.gather(1, taken.unseen.choice[:, None])[:, 0]
    gain = validation.losses[:, taken.guard.fallback] - realised
    assert float(gain.mean()) == pytest.approx(taken.guard.gain.value, abs=1e-6)
    refused = fit_tuned(options, train, validation, 0, paper=Knowing(validation, 9.0))
    assert refused.chosen != "paper"
    assert refused.unseen.rows.tolist() == list(range(144))
    assert not refused.candidates[-1].wins
    alone = fit_tuned(
        Options(objective="expected_loss", epochs=1), train, validation, 0, paper=Knowing(validation, 0.0)
    )
    assert [candidate.name for candidate in alone.candidates] == ["network-expected_loss"]


def test_the_papers_router_is_taken_where_no_candidate_wins(planted):
    train, validation = planted(96, 0.0, 1), planted(48, 0.0, 2)
    fitted = fit_tuned(Options(epochs=1, guard=False), train, validation, 0, paper=Knowing(validation, 0.0))
    assert fitted.chosen == "paper"
    assert torch.equal(fitted.unseen.choice, validation.losses.argmin(1))


def test_the_best_of_many_epochs_has_to_clear_a_higher_bar(planted):
    train, validation = planted(96, 0.0, 1), planted(48, 0.0, 2)
    rival = Knowing(validation, 0.0)
    once, often = (guard(rival, validation, None, epochs)[1] for epochs in (1, 10**12))
    compared = [
        fit_tuned(Options(epochs=1), train, validation, 0, paper=rival, epochs=epochs).candidates[-1].compared
        for epochs in (1, 10)
    ]
    assert compared == [7, 70]
    assert once.gain == often.gain
    assert once.kept
    assert not often.kept
    fixed = torch.zeros_like(rival.costs)
    assert better(rival.costs, fixed, validation)
    assert not better(rival.costs, fixed, validation, 10**12)


def test_the_papers_router_has_to_clear_the_bar_too(planted):
    """Right about two documents of twelve: 1.5 standard errors, and one of seven needs more than two."""
    train, validation = planted(96, 0.0, 1), planted(48, 0.0, 2)
    lucky = Knowing(validation, 0.0)
    lucky.costs[8:] = (torch.arange(3) != validation.best_single).float()
    fitted = fit_tuned(Options(epochs=1), train, validation, 0, paper=lucky)
    gain = fitted.candidates[-1].gain
    assert 1.0 < gain.value / gain.standard_error < 2.0
    assert better(lucky.costs, (torch.arange(3) != validation.best_single).float().expand(48, 3), validation)
    assert fitted.chosen == "constant"


def test_better_asks_for_more_than_the_error_of_the_difference(planted):
    examples = planted(48, 0.1, 1)
    assert better(examples.losses, -examples.losses, examples)
    assert not better(examples.losses, examples.losses, examples)
    noise = torch.randn(48, 3, generator=torch.Generator().manual_seed(0))
    assert not better(noise, -noise, examples)


def test_tuned_is_constant_where_nothing_can_be_learnt(planted):
    """Experts differ a lot on average and not at all by input: any other choice is a loss."""
    train, validation = planted(96, 0.0, 1), planted(32, 0.0, 2)
    for examples in (train, validation):
        examples.losses[:, 1] -= 0.05
    fitted = fit_tuned(Options(epochs=2), train, validation, 0)
    assert fitted.chosen == "constant"
    assert isinstance(fitted.router, Constant)
    assert set(choose(fitted.router.predict(train.features)).tolist()) == {1}
    assert fitted.to_json()["guard"] is None


def test_what_the_recipe_sets_replaces_the_preset(planted):
    train, validation = planted(24, 0.2, 1), planted(16, 0.2, 2)
    options = Options(
        preset="paper", objective="expected_loss", epochs=1, layers=1, heads=2, dropout=0.0, max_tokens=6, guard=False
    )
    fitted = fit_paper(options, train, validation, 0)
    assert fitted.router is fitted.unguarded
    assert fitted.guard is None
    assert isinstance(fitted.router, NetworkRouter)
    chosen = fitted.router.network.options
    assert (chosen["layers"], chosen["heads"], chosen["dropout"], chosen["max_tokens"]) == (1, 2, 0.0, 6)
    only = fit_tuned(Options(objective="centred_regression", epochs=1), train, validation, 0)
    assert [candidate.name for candidate in only.candidates] == ["network-centred_regression"]


@pytest.fixture
def trainings(monkeypatch) -> dict[str, TrainingOptions]:
    """What networks are trained with, by their names, as the test goes."""
    seen: dict[str, TrainingOptions] = {}
    original = module.train_network

    def spy(make, train, validation, training, seed, name, epoch_done):
        seen[name] = training
        return original(make, train, validation, training, seed, name, epoch_done)

    monkeypatch.setattr(module, "train_network", spy)
    return seen


def test_the_papers_text_network_trains_in_what_the_processor_has_and_the_recipe_has_the_last_word(planted, trainings):
    train, validation = planted(24, 0.2, 1), planted(16, 0.2, 2)
    fit_paper(Options(epochs=1), train, validation, 0)
    fit_tuned(Options(epochs=1, objective="expected_loss"), train, validation, 0)
    names = ("paper", "network-expected_loss")
    assert [trainings[name].precision for name in names] == ["auto", "float32"]
    fit_paper(Options(epochs=1, precision="float32"), train, validation, 0)
    fit_tuned(Options(epochs=1, objective="expected_loss", precision="bfloat16"), train, validation, 0)
    assert [trainings[name].precision for name in names] == ["float32", "bfloat16"]


def test_balance_is_the_papers_and_only_on_request_in_tuned(planted, trainings):
    train, validation = planted(24, 0.2, 1), planted(16, 0.2, 2)
    fit_paper(Options(preset="paper", epochs=1), train, validation, 0)
    assert trainings.pop("paper").balance == Balance()
    fit_tuned(Options(epochs=1), train, validation, 0)
    assert {training.balance for training in trainings.values()} == {None}
    fit_tuned(Options(epochs=1, balance=Balance(usage_decay=0.5)), train, validation, 0)
    assert trainings["network-expected_loss"].balance == Balance(usage_decay=0.5)
    assert trainings["network-centred_regression"].balance is None
    with pytest.raises(RecipeError, match=r"router\.balance"):
        fit_paper(Options(preset="paper", objective="centred_regression", balance=Balance()), train, validation, 0)


def test_compute_is_capped_with_a_warning_unless_epochs_are_set(planted, monkeypatch, caplog):
    train, validation = planted(24, 0.2, 1), planted(16, 0.2, 2)
    monkeypatch.setattr(module, "MAX_MULTIPLICATIONS", 1.0)
    with caplog.at_level(logging.WARNING, "moqe"):
        assert len(fit_paper(Options(preset="paper"), train, validation, 0).history) == 1
        assert "1 epochs instead of 10" in caplog.text
        caplog.clear()
        assert len(fit_paper(Options(preset="paper", epochs=3), train, validation, 0).history) == 3
    assert caplog.text == ""


def test_two_fits_are_equal(planted):
    train, validation, test = planted(48, 0.2, 1), planted(24, 0.2, 2), planted(24, 0.2, 3)
    for fit, preset in ((fit_paper, "paper"), (fit_tuned, "tuned")):
        one, two = (fit(Options(preset=preset, epochs=2), train, validation, 5) for _ in range(2))
        assert one.to_json() == two.to_json()
        assert torch.equal(one.unguarded.predict(test.features), two.unguarded.predict(test.features))


def test_too_few_documents_to_compare(planted):
    with pytest.raises(DataError, match="add documents"):
        fit_tuned(Options(), planted(8, 0.2, 1), planted(4, 0.2, 2), 0)


def test_the_papers_image_router_learns_and_is_saved(tmp_path):
    train, validation, test = images(193, 0.2, 1), images(64, 0.2, 2), images(200, 0.2, 3)  # 193: a last batch of one
    fitted = fit_paper(Options(preset="paper", learning_rate=3e-3), train, validation, 0, "image")
    assert isinstance(fitted.unguarded, NetworkRouter)
    assert (fitted.unguarded.network.kind, fitted.unguarded.network.options) == (
        "image",
        {"dimension": 16, "experts": 3},
    )
    assert realised(fitted.router, test) < float(test.losses[:, validation.best_single].mean()) - 0.03
    save_router(fitted.router, tmp_path)
    assert torch.equal(load_router(tmp_path).predict(test.features), fitted.router.predict(test.features))


def test_the_papers_numbers_for_images():
    training = module.PAPER["image"].training
    assert (training.objective, training.batch_size, training.accumulation) == ("cross_entropy", 48, 2)
    assert (training.learning_rate, training.weight_decay) == (5e-5, 0.0)


def test_tuned_finds_a_planted_signal_in_vectors(tmp_path):
    train, validation, test = images(192, 0.2, 1), images(64, 0.2, 2), images(200, 0.2, 3)
    fitted = fit_tuned(Options(epochs=1), train, validation, 0, "image")
    assert len(fitted.candidates) == 6
    assert realised(fitted.router, test) < float(test.losses[:, validation.best_single].mean()) - 0.05
    options = Options(objective="expected_loss", epochs=8, learning_rate=1e-2)
    network = fit_tuned(options, train, validation, 0, "image").unguarded
    assert isinstance(network, NetworkRouter)
    assert network.network.kind == "mlp"
    assert realised(network, test) < float(test.losses[:, validation.best_single].mean()) - 0.05
    save_router(network, tmp_path)
    assert torch.equal(load_router(tmp_path).predict(test.features), network.predict(test.features))


def test_unseen_choices_are_those_of_routers_that_had_not_seen_the_sample(planted):
    train, validation = planted(96, 0.2, 1), planted(32, 0.2, 2)
    paper = fit_paper(Options(preset="paper", learning_rate=2e-3, epochs=3), train, validation, 0)
    assert paper.unseen.rows.tolist() == list(range(96, 128))
    assert torch.equal(paper.unseen.choice, choose(paper.router.predict(validation.features)))
    tuned = fit_tuned(Options(objective="expected_loss", epochs=2), train, validation, 0)
    assert tuned.unseen.rows.tolist() == list(range(128))
    assert tuned.guard is not None
    pool = train.join(validation)
    fallback = pool.losses[:, tuned.guard.fallback]
    gain = fallback - pool.losses.gather(1, tuned.unseen.choice[:, None])[:, 0]
    assert float(gain.mean()) == pytest.approx(tuned.guard.gain.value, abs=1e-6)


def test_unseen_choices_are_those_after_the_guard(planted, monkeypatch):
    """A guard that refuses everything leaves its fallback; without a guard the choices are the router's."""
    monkeypatch.setattr(module, "decide", lambda *_: GuardDecision(2, False, 0.0, ClusteredMean(0.0, 1.0, 9), 0.0))
    train, validation = planted(96, 0.2, 1), planted(32, 0.2, 2)
    options = Options(objective="expected_loss", epochs=2)
    assert set(fit_tuned(options, train, validation, 0).unseen.choice.tolist()) == {2}
    free = fit_tuned(options.model_copy(update={"guard": False}), train, validation, 0)
    assert len(set(free.unseen.choice.tolist())) == 3


def test_the_guards_gain_is_in_what_judges():
    train, validation = (
        replace(examples, judged=10.0 * examples.losses) for examples in (images(192, 0.3, 1), images(64, 0.3, 2))
    )
    fitted = fit_tuned(Options(epochs=1), train, validation, 0, "image")
    assert fitted.guard is not None
    judged = train.join(validation).deciding
    gain = judged[:, fitted.guard.fallback] - judged.gather(1, fitted.unseen.choice[:, None])[:, 0]
    assert float(gain.mean()) == pytest.approx(fitted.guard.gain.value, abs=1e-5)
    assert fitted.guard.gain.value > 0.3


def test_choices_of_a_constant_router_are_constant(planted):
    fitted = fit_tuned(Options(epochs=1), planted(48, 0.0, 1), planted(16, 0.0, 2), 0)
    assert fitted.chosen == "constant"
    assert set(fitted.unseen.choice.tolist()) == set(
        choose(fitted.router.predict(planted(8, 0.0, 3).features)).tolist()
    )


@pytest.mark.parametrize("fit", [fit_paper, fit_tuned])
def test_what_judges_decides_on_the_fallback(fit):
    """Expert 1 has the lowest cross-entropy and is wrong most often; features say nothing."""
    generator = torch.Generator().manual_seed(0)

    def make(n: int, name: str) -> RoutingExamples:
        losses = 1.0 + 0.1 * torch.rand(n, 3, generator=generator)
        losses[:, 1] -= 0.5
        wrong = (torch.rand(n, 3, generator=generator) < torch.tensor([0.3, 0.8, 0.5])).float()
        vectors = torch.randn(n, 4, generator=generator)
        return RoutingExamples(VectorFeatures(vectors), losses, tuple(f"{name}{i}" for i in range(n)), wrong)

    train, validation = make(96, "t"), make(64, "v")
    fitted = fit(Options(epochs=1), train, validation, 0, "image")
    assert validation.best_single == 0
    assert set(choose(fitted.router.predict(validation.features)).tolist()) == {0}
    assert set(fitted.unseen.choice.tolist()) == {0}
    assert all(candidate.loss <= 1.0 for candidate in fitted.candidates)
