import pytest
import torch

from moqe.errors import DataError, NumericalError
from moqe.router.examples import RoutingExamples
from moqe.router.features import JoinedFeatures, SelectedFeatures, TokenFeatures, VectorFeatures


@pytest.fixture
def embedding() -> torch.Tensor:
    return torch.randn(20, 6, generator=torch.Generator().manual_seed(0)).bfloat16()


def tokens(n: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 20, (n, 5), generator=torch.Generator().manual_seed(seed))


def test_pooled_is_the_mean_of_the_batch(embedding):
    features = TokenFeatures(tokens(70, 1), embedding)
    everything = features.batch(torch.arange(70))
    assert everything.dtype == torch.float32
    torch.testing.assert_close(features.pooled(), everything.mean(1))


def test_views_show_the_same_samples(embedding):
    first, second = TokenFeatures(tokens(4, 1), embedding), TokenFeatures(tokens(3, 2), embedding)
    joined = JoinedFeatures(first, second)
    whole = TokenFeatures(torch.cat([first.tokens, second.tokens]), embedding)
    assert len(joined) == 7
    for rows in ([0, 3], [4, 6], [5, 0, 6, 2], [6, 5, 1]):
        index = torch.tensor(rows)
        assert torch.equal(joined.batch(index), whole.batch(index))
        chosen = SelectedFeatures(joined, index)
        assert torch.equal(chosen.batch(torch.tensor([1, 0])), whole.batch(index[[1, 0]]))
        assert torch.equal(chosen.pooled(), whole.pooled()[index])


def test_the_first_tokens_of_every_view(embedding):
    first, second = TokenFeatures(tokens(4, 1), embedding), TokenFeatures(tokens(3, 2), embedding)
    joined, rows = JoinedFeatures(first, second), torch.tensor([6, 0, 5])
    chosen = SelectedFeatures(joined, rows)
    assert (first.length, joined.length, chosen.length) == (5, 5, 5)
    cut = torch.cat([first.tokens, second.tokens])[:, :2]
    expected = TokenFeatures(cut, embedding).pooled()
    assert torch.equal(joined.first(2).pooled(), expected)
    assert torch.equal(chosen.first(2).pooled(), expected[rows])
    assert chosen.first(2).length == 2
    vectors = VectorFeatures(torch.randn(3, 4))
    assert vectors.length is None
    assert vectors.first(2) is vectors


def test_joining_samples_of_different_lengths_is_an_error(embedding):
    features = TokenFeatures(tokens(2, 1), embedding)
    with pytest.raises(DataError, match="samples of 5 and 2 tokens"):
        JoinedFeatures(features, features.first(2))


def test_joining_different_dimensions_is_an_error(embedding):
    with pytest.raises(DataError, match="dimension 6 and 3"):
        JoinedFeatures(TokenFeatures(tokens(2, 1), embedding), TokenFeatures(tokens(2, 1), embedding[:, :3]))


def test_examples_check_themselves(embedding):
    features = TokenFeatures(tokens(2, 1), embedding)
    losses = torch.tensor([[1.0, 2.0], [3.0, 1.0]])
    with pytest.raises(DataError, match="do not describe the same samples"):
        RoutingExamples(features, losses, ("a",))
    with pytest.raises(NumericalError, match="not finite"):
        RoutingExamples(features, losses * torch.inf, ("a", "b"))
    with pytest.raises(DataError, match="no samples"):
        RoutingExamples(TokenFeatures(tokens(0, 1), embedding), losses[:0], ())


def test_examples_select_join_and_centre(embedding):
    examples = RoutingExamples(
        TokenFeatures(tokens(3, 1), embedding), torch.tensor([[1.0, 2.0], [3.0, 1.0], [0.0, 4.0]]), ("a", "b", "c")
    )
    assert examples.best_single == 0
    assert torch.equal(examples.centred, torch.tensor([[-0.5, 0.5], [1.0, -1.0], [-2.0, 2.0]], dtype=torch.float64))
    both = examples.select(torch.tensor([2, 0])).join(examples.select(torch.tensor([1])))
    assert both.document == ("c", "a", "b")
    assert torch.equal(both.losses, examples.losses[[2, 0, 1]])
    assert torch.equal(both.features.pooled(), examples.features.pooled()[[2, 0, 1]])


def test_vectors_are_handed_out_as_they_are():
    vectors = torch.randn(7, 6, generator=torch.Generator().manual_seed(0)).half()
    features = VectorFeatures(vectors)
    assert (len(features), features.dimension) == (7, 6)
    assert torch.equal(features.batch(torch.tensor([3, 1])), vectors[[3, 1]].float())
    assert torch.equal(features.pooled(), vectors.float())
    joined = JoinedFeatures(SelectedFeatures(features, torch.tensor([4, 2])), VectorFeatures(vectors[:1]))
    assert torch.equal(joined.pooled(), vectors[[4, 2, 0]].float())
    with pytest.raises(DataError, match=r"shape \(7, 6, 1\) are not one vector per sample"):
        VectorFeatures(vectors[..., None])


def test_examples_may_be_judged_by_something_else():
    features = VectorFeatures(torch.randn(3, 2))
    losses, wrong = (
        torch.tensor([[1.0, 2.0], [3.0, 1.0], [0.0, 4.0]]),
        torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 0.0]]),
    )
    examples = RoutingExamples(features, losses, ("a", "b", "c"), wrong)
    assert RoutingExamples(features, losses, ("a", "b", "c")).best_single == 0
    assert examples.best_single == 1
    assert torch.equal(examples.select(torch.tensor([2, 1])).deciding, wrong[[2, 1]])
    assert torch.equal(examples.join(examples).deciding, torch.cat([wrong, wrong]))
    with pytest.raises(DataError, match="cannot be joined"):
        examples.join(RoutingExamples(features, losses, ("a", "b", "c")))
    with pytest.raises(DataError, match=r"cannot be judged by values of shape \(3, 1\)"):
        RoutingExamples(features, losses, ("a", "b", "c"), wrong[:, :1])
    with pytest.raises(NumericalError, match="not finite"):
        RoutingExamples(features, losses, ("a", "b", "c"), wrong * torch.nan)
