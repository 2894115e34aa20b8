"""Shorter samples than a router was trained on have thresholds and temperatures of their own."""

import pytest
import torch

from moqe.router import RoutingExamples, TokenFeatures, load_router, save_router
from moqe.router.baselines import Constant
from moqe.router.levels import Level, best_temperature, fit_levels, lengths, level_at, tempered
from moqe.router.novelty import NoveltyRouter, fit_novelty

LEVELS = (Level(64, 1.0, 1.0), Level(16, 3.0, 2.0), Level(4, 4.0, 8.0))
VOCABULARY, LONGEST = 30, 32  # tokens of each of three kinds of text


def texts(n: int, seed: int, kinds: tuple[int, ...] = (0, 1)) -> RoutingExamples:
    """Windows of tokens, each text of the vocabulary of its kind and of common tokens."""
    generator = torch.Generator().manual_seed(seed)
    embedding = torch.randn(4 * VOCABULARY, 16, generator=torch.Generator().manual_seed(0))
    embedding[2 * VOCABULARY : 3 * VOCABULARY] += 1.0  # the third kind lies apart
    kind = torch.tensor(kinds)[torch.arange(n) % len(kinds)]
    own = kind[:, None] * VOCABULARY + torch.randint(VOCABULARY, (n, LONGEST), generator=generator)
    common = 3 * VOCABULARY + torch.randint(VOCABULARY, (n, LONGEST), generator=generator)
    tokens = torch.where(torch.rand(n, LONGEST, generator=generator) < 0.6, own, common)
    losses = torch.ones(n, 3)
    losses[torch.arange(n), kind.clamp(max=1)] = 0.0
    names = tuple(f"{seed}-{row}" for row in range(n))
    return RoutingExamples(TokenFeatures(tokens, embedding), losses, names, label=tuple(map(str, kind.tolist())))


def test_lengths_halve_down_to_four():
    assert lengths(64) == [64, 32, 16, 8, 4]
    assert lengths(50) == [50, 25, 12, 6]
    assert lengths(3) == [3]
    assert lengths(None) == [None]


@pytest.mark.parametrize(
    ("length", "threshold", "temperature"),
    [(64, 1.0, 1.0), (999, 1.0, 1.0), (None, 1.0, 1.0), (32, 2.0, 1.5), (16, 3.0, 2.0), (8, 3.5, 5.0), (1, 4.0, 8.0)],
)
def test_levels_are_linear_in_the_logarithm_of_the_length(length, threshold, temperature):
    found = level_at(LEVELS, length)
    assert (found.threshold, found.temperature) == pytest.approx((threshold, temperature))


def test_vectors_have_one_level():
    levels = fit_levels(None, lambda length: (2.0, 1.0))
    assert levels == (Level(None, 2.0),)
    assert level_at(levels, None) == levels[0]


def test_what_is_shorter_is_not_held_to_less():
    own = {16: (2.0, 1.0), 8: (1.5, 3.0), 4: (2.5, 2.0)}
    levels = fit_levels(16, lambda length: own[length])
    assert levels == (Level(16, 2.0, 1.0), Level(8, 2.0, 3.0), Level(4, 2.5, 3.0))


@pytest.mark.parametrize("temperature", [1.5, 4.0])
def test_the_temperature_that_labels_were_drawn_with_is_found(temperature):
    generator = torch.Generator().manual_seed(0)
    scores = 6 * torch.randn(4000, 5, generator=generator).double()
    truth = torch.multinomial((scores / temperature).softmax(1), 1, generator=generator)[:, 0]
    found = best_temperature(scores.softmax(1), truth)
    assert found == pytest.approx(temperature, rel=0.1)
    torch.testing.assert_close(tempered(scores.softmax(1), temperature), (scores / temperature).softmax(1))


def test_a_classifier_that_is_not_sure_enough_stays_as_it_is():
    truth = torch.arange(100) % 2
    probabilities = torch.full((100, 2), 0.45).scatter(1, truth[:, None], 0.55)
    assert best_temperature(probabilities, truth) == 1.0
    assert best_temperature(probabilities[:0], truth[:0]) == 1.0
    assert tempered(probabilities, 1.0) is probabilities


def test_few_tokens_of_a_known_kind_are_not_novel_and_of_an_unknown_kind_are():
    novelty = fit_novelty(texts(200, 1), texts(200, 2), 0.95)
    full = novelty.levels[0]
    known, unknown = texts(300, 3).features, texts(300, 4, (2,)).features
    for length in (32, 16, 8):
        threshold = level_at(novelty.levels, length).threshold
        assert float((novelty.measure(known.first(length)) > threshold).double().mean()) < 0.12
        of_known, of_unknown = (float(novelty.novel(seen.first(length)).double().mean()) for seen in (known, unknown))
        assert of_known < 0.2 < 0.6 < of_unknown
    assert float((novelty.measure(known.first(8)) > full.threshold).double().mean()) > 0.8  # by the level of 32 tokens


def test_the_classifier_is_less_sure_of_few_tokens():
    novelty = fit_novelty(texts(200, 1), texts(200, 2), 0.95)
    temperatures = [level.temperature for level in novelty.levels]
    assert temperatures[0] == 1.0
    assert temperatures == sorted(temperatures)
    assert temperatures[-1] > 1.5
    assert novelty.kinds is not None
    few = texts(300, 3).features.first(4)
    near = novelty.measure(few) <= level_at(novelty.levels, 4).threshold
    untempered = novelty.kinds.probabilities(few)
    sure_of_means, sure = (p.amax(1) > 0.6 for p in (untempered, tempered(untempered, temperatures[-1])))
    assert int((near & sure_of_means & ~sure).sum()) > 10
    assert torch.equal(novelty.novel(few), ~(near & sure))


def test_levels_are_saved(tmp_path):
    router = NoveltyRouter(Constant(torch.tensor([0.0, 1.0, 2.0])), 2, fit_novelty(texts(60, 1), texts(60, 2), 0.95))
    save_router(router, tmp_path)
    again = load_router(tmp_path)
    assert isinstance(again, NoveltyRouter)
    assert again.novelty.levels == router.novelty.levels
    few = texts(50, 3).features.first(6)
    assert torch.equal(again.predict(few), router.predict(few))
