import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from moqe.evaluate.significance import Interval, intervals, mcnemar, resampled_ratios, wilcoxon


def clustered(seed: int, documents: int = 40, per_document: int = 3) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Losses whose windows share their document's level: (document, loss, tokens), true mean 0."""
    rng = np.random.default_rng(seed)
    document = np.repeat([f"d{i}" for i in range(documents)], per_document)
    tokens = rng.integers(50, 150, documents * per_document).astype(float)
    level = np.repeat(rng.normal(0, 1, documents), per_document) + rng.normal(0, 0.3, documents * per_document)
    return document, level * tokens, tokens


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    covered = 0
    for seed in range(200):
        document, loss, tokens = clustered(seed)
        (found,) = intervals(document, loss[:, None], tokens, 300, seed)
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= 0 <= found.high
    assert 0.88 <= covered / 200 <= 0.99


def test_resampling_windows_instead_of_documents_would_be_overconfident() -> None:
    document, loss, tokens = clustered(0)
    by_document = resampled_ratios(document, loss[:, None], tokens, 500, 0).std()
    by_window = resampled_ratios(np.arange(len(loss)).astype(str), loss[:, None], tokens, 500, 0).std()
    assert by_document > 1.4 * by_window


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 12))
def test_the_interval_of_a_document_mean_contains_the_mean(seed: int, documents: int) -> None:
    document, loss, tokens = clustered(seed, documents)
    (found,) = intervals(document, loss[:, None], tokens, 200, seed, differences=True)
    assert found.low is not None
    assert found.high is not None
    assert found.low <= found.value <= found.high
    assert found.p is not None
    assert 0 < found.p <= 1
    assert (found.n_documents, found.n_samples) == (documents, 3 * documents)


def test_no_difference_is_an_interval_of_zero() -> None:
    document, loss, tokens = clustered(1)
    (found,) = intervals(document, np.zeros((len(loss), 1)), tokens, 100, 0, differences=True)
    assert (found.value, found.low, found.high, found.p) == (0.0, 0.0, 0.0, 1.0)
    assert not found.excludes_zero()


def test_the_same_seed_pairs_two_calls() -> None:
    document, loss, tokens = clustered(2)
    shifted = resampled_ratios(document, np.stack([loss, loss + tokens], 1), tokens, 300, 5)
    assert np.allclose(shifted[:, 1] - shifted[:, 0], 1.0)
    assert np.array_equal(shifted[:, :1], resampled_ratios(document, loss[:, None], tokens, 300, 5))


def test_order_of_samples_does_not_matter() -> None:
    document, loss, tokens = clustered(3)
    order = np.random.default_rng(0).permutation(len(loss))
    (one,) = intervals(document, loss[:, None], tokens, 200, 0)
    (two,) = intervals(document[order], loss[order, None], tokens[order], 200, 0)
    assert one.low == pytest.approx(two.low)
    assert one.high == pytest.approx(two.high)


def test_one_document_has_no_interval_and_few_documents_no_claim() -> None:
    (found,) = intervals(np.array(["a", "a"]), np.array([[1.0], [2.0]]), np.array([1.0, 1.0]), 100, 0)
    assert (found.value, found.low, found.high) == (1.5, None, None)
    assert not found.excludes_zero()
    assert not Interval(1.0, 0.5, 1.5, 0.06, n_documents=5, n_samples=50).excludes_zero()
    assert Interval(1.0, 0.5, 1.5, 0.03, n_documents=6, n_samples=6).excludes_zero()
    assert not Interval(1.0, -0.1, 1.5, 0.03, n_documents=60, n_samples=60).excludes_zero()


def test_wilcoxon_by_hand() -> None:
    # 6 positive differences: both tails of 2^6 sign patterns hold one pattern each
    assert wilcoxon(np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])) == pytest.approx(2 / 64)
    assert wilcoxon(np.zeros(9)) == 1.0
    noisy = np.random.default_rng(0).normal(0.2, 1, 80)
    assert wilcoxon(np.append(noisy, [0.0, 0.0])) == pytest.approx(float(stats.wilcoxon(noisy).pvalue))


def test_mcnemar_by_hand() -> None:
    first = np.array([True] * 6 + [False] + [True] * 5)
    second = np.array([False] * 6 + [True] + [True] * 5)
    # 6 against 1 disagreements: 2 * (1 + 7) / 2^7
    assert mcnemar(first, second) == pytest.approx(2 * 8 / 128)
    assert mcnemar(first, first) == 1.0
