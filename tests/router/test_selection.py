import math
from collections import Counter

import pytest
import torch

from moqe.errors import DataError
from moqe.router.linear import fit_linear
from moqe.router.selection import Candidate, bar, folds_by_document, judge, predict_unseen
from moqe.router.uncertainty import clustered_mean


def test_folds_hold_whole_documents_and_about_equally_many_samples():
    document = [
        name for name, size in zip("abcdefghij", (7, 1, 3, 3, 2, 5, 4, 4, 6, 5), strict=True) for _ in range(size)
    ]
    fold = folds_by_document(document, 4, seed=0)
    assert all(len({int(f) for f, d in zip(fold, document, strict=True) if d == name}) == 1 for name in "abcdefghij")
    assert set(Counter(fold.tolist()).values()) <= {9, 10, 11}
    assert torch.equal(fold, folds_by_document(document, 4, seed=0))
    with pytest.raises(DataError, match="has 10 documents and cross-validation needs 11"):
        folds_by_document(document, 11, seed=0)


def test_no_sample_is_predicted_by_a_router_that_saw_its_document(planted):
    examples = planted(48, 0.1, 1)
    fold = folds_by_document(examples.document, 4, seed=3)
    fitted_on: list[set[str]] = []

    class Witness:
        name, unit = "witness", "nats"

        def __init__(self, seen):
            self.seen = seen

        def predict(self, features):
            documents = {examples.document[int(row)] for row in features.rows}
            assert not documents & self.seen
            return torch.zeros(len(features), examples.experts)

    def fit(train, validation):
        assert not set(train.document) & set(validation.document)
        fitted_on.append(set(train.document) | set(validation.document))
        return Witness(fitted_on[-1])

    steps: list[int] = []
    costs = predict_unseen(fit, examples, fold, steps.append)
    assert costs.shape == (48, 3)
    assert steps == [1, 1, 1, 1]


def test_unseen_predictions_are_in_the_samples_order(planted):
    examples = planted(120, 0.3, 2, noise=0.01)
    costs = predict_unseen(fit_linear, examples, folds_by_document(examples.document, 4, 0), lambda steps: None)
    candidate = judge("linear", costs, examples, examples.best_single)
    assert candidate.wins
    assert candidate.loss == pytest.approx(float(examples.losses.amin(1).mean()), abs=0.03)
    shuffled = judge("shuffled", costs.roll(60, 0), examples, examples.best_single)
    assert shuffled.loss > candidate.loss + 0.05


def test_the_bar_divides_one_candidates_chance_among_all():
    assert bar(1, 3) == pytest.approx(1.0)
    assert bar(1, 40) == pytest.approx(1.0)
    assert bar(5, 10**6) == pytest.approx(1.8556, abs=1e-3)  # 1 - 0.15866 / 5 of a standard normal
    assert bar(5, 40) < bar(5, 10) < bar(5, 3)
    assert bar(2, 40) < bar(5, 40)


@pytest.mark.parametrize("alike", [0.0, 0.8])
def test_of_five_routers_of_noise_one_is_kept_no_more_often_than_a_single_one(alike):
    """Gains of noise with mean zero, by document, `alike` of their variance shared by the candidates."""
    trials, candidates, documents = 500, 5, 10
    generator = torch.Generator().manual_seed(1)
    shared = torch.randn(trials, 1, documents, generator=generator)
    own = torch.randn(trials, candidates, documents, generator=generator)
    gains = math.sqrt(alike) * shared + math.sqrt(1 - alike) * own
    names = [str(i) for i in range(documents)]

    def kept(compared: int) -> float:
        found = [
            any(Candidate("noise", 0.0, clustered_mean(gain, names), compared).wins for gain in trial)
            for trial in gains[:, :compared]
        ]
        return sum(found) / trials

    chance = 0.172  # P(T > 1) with 9 degrees of freedom
    assert kept(1) == pytest.approx(chance, abs=0.05)  # three standard errors of 500 trials
    assert kept(candidates) < chance + 0.05


def test_a_useful_router_is_kept_among_five(planted):
    """Right on two samples of three, by 0.05 nats under noise of 0.03 and a spread of the losses of 0.5."""
    for seed in range(20):
        examples = planted(240, 0.05, seed)
        best = torch.tensor([int(row) for row in examples.losses.argmin(1)])
        costs = 1.0 - torch.nn.functional.one_hot(best, 3).double()
        costs[::3] = costs[::3].roll(1, 1)  # every third prediction is wrong
        assert judge("useful", costs, examples, examples.best_single, compared=5).wins


def test_one_document_wins_nothing():
    assert not Candidate("lucky", 0.0, clustered_mean(torch.ones(5), ["same"] * 5), 1).wins
