from collections import Counter

import pytest
import torch

from moqe.errors import DataError
from moqe.router.linear import fit_linear
from moqe.router.selection import folds_by_document, judge, predict_unseen


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
