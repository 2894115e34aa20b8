"""Novelty: told from validation documents, in units of the neighbours' own distances; the fallback gets what is new."""

from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moqe.data.bundled import bundled_documents
from moqe.data.windows import pack_windows
from moqe.errors import DataError
from moqe.models.decoder import Decoder
from moqe.recipe import Router as Options
from moqe.router import (
    GuardedRouter,
    NoveltyRouter,
    RoutingExamples,
    TokenFeatures,
    VectorFeatures,
    choose,
    fit_paper,
    fit_tuned,
    innermost,
    load_router,
    novelty_of,
    save_router,
    with_innermost,
)
from moqe.router.baselines import Constant, fit_constant
from moqe.router.linear import fit_linear
from moqe.router.novelty import fit_novelty, refused_unseen, settle
from moqe.router.router import prefer
from moqe.router.selection import folds_by_document
from moqe.router.standardiser import Standardiser


def examples(vectors: torch.Tensor, document: list[str] | None = None, experts: int = 3) -> RoutingExamples:
    names = document or [str(row) for row in range(len(vectors))]
    return RoutingExamples(VectorFeatures(vectors), torch.zeros(len(vectors), experts), tuple(names))


def cloud(n: int, seed: int, dimension: int = 8, centre: float = 0.0, width: float = 1.0) -> torch.Tensor:
    return centre + width * torch.randn(n, dimension, generator=torch.Generator().manual_seed(seed))


def test_a_line_of_points_by_hand():
    """Six points one apart, one document each; their 5 nearest lie 1 to 5 away at the ends, 1, 1, 2, 2, 3 within."""
    train = examples(torch.arange(6.0)[:, None])
    found = fit_novelty(train, examples(torch.tensor([[6.0], [2.0]])), 0.5)
    unit = float(found.standardise.deviation[0])  # of 0..5: the square root of 35 / 12
    assert unit == pytest.approx((35 / 12) ** 0.5)
    assert (unit * found.spread).tolist() == pytest.approx([3.0, 2.2, 1.8, 1.8, 2.2, 3.0])
    beyond = (1 + 2 + 3 + 4 + 5) / 5 / ((3.0 + 2.2 + 1.8 + 1.8 + 2.2) / 5)
    among = (0 + 1 + 1 + 2 + 2) / 5 / ((1.8 + 1.8 + 2.2 + 2.2 + 3.0) / 5)
    measured = found.measure(VectorFeatures(torch.tensor([[6.0], [2.0]])))
    assert measured.tolist() == pytest.approx([beyond, among], rel=1e-6)
    assert found.levels[0].threshold == pytest.approx((beyond + among) / 2, rel=1e-6)
    assert found.novel(VectorFeatures(torch.tensor([[6.0], [2.0]]))).tolist() == [True, False]


def test_neighbours_of_the_same_document_say_nothing():
    """Every document is two equal samples; a nearest neighbour at distance 0 would make everything novel."""
    vectors = cloud(40, 0).repeat_interleave(2, 0)
    found = fit_novelty(examples(vectors, [str(row // 2) for row in range(80)]), examples(cloud(40, 1)), 0.99)
    assert float(found.spread.min()) > 0.5
    assert not bool(found.novel(VectorFeatures(vectors)).any())


def test_the_threshold_comes_from_validation():
    train, known = examples(cloud(200, 0)), VectorFeatures(cloud(400, 2))
    shares = [
        float(fit_novelty(train, examples(cloud(400, 1)), quantile).novel(known).float().mean())
        for quantile in (0.5, 0.9, 0.99)
    ]
    assert shares == pytest.approx([0.5, 0.1, 0.01], abs=0.05)
    wide = fit_novelty(train, examples(cloud(400, 1, width=3.0)), 0.99)
    assert float(wide.novel(known).float().mean()) == 0.0


def test_a_broad_kind_does_not_hide_what_lies_beside_a_narrow_one():
    def known(n: int, seed: int) -> torch.Tensor:
        return torch.cat([cloud(n, seed, width=0.1), cloud(n, seed + 1, centre=12.0, width=2.0)])

    found = fit_novelty(examples(known(100, 0)), examples(known(50, 2)), 0.99)
    beside = VectorFeatures(cloud(50, 4, centre=0.4, width=0.1))
    assert bool(found.novel(beside).all())
    distances = torch.cdist(found.standardise(beside.pooled()), found.keys.double()).amin(1)
    broad = torch.cdist(found.standardise(cloud(50, 3, centre=12.0, width=2.0)), found.keys.double()).amin(1)
    assert float(distances.max()) < float(broad.quantile(0.9))  # by distance alone nobody would notice


def test_equal_samples_are_not_novel():
    same = torch.ones(8, 3)
    found = fit_novelty(examples(same), examples(same), 0.99)
    assert not bool(found.novel(VectorFeatures(same)).any())
    assert bool(found.novel(VectorFeatures(same + 1)).all())


def test_one_document_cannot_be_compared():
    with pytest.raises(DataError, match="at least two training documents"):
        fit_novelty(examples(cloud(8, 0), ["same"] * 8), examples(cloud(8, 1)), 0.99)


def test_novel_samples_get_the_fallback_and_the_others_what_the_router_says():
    train, validation = examples(cloud(60, 0)), examples(cloud(60, 1))
    inner = fit_constant(RoutingExamples(train.features, torch.tensor([[2.0, 1.0, 3.0]] * 60), train.document))
    router = NoveltyRouter(inner, 2, fit_novelty(train, validation, 0.99))
    mixed = VectorFeatures(torch.cat([cloud(3, 2), cloud(3, 3, centre=9.0)]))
    assert choose(router.predict(mixed)).tolist() == [1, 1, 1, 2, 2, 2]
    assert torch.equal(router.predict(mixed)[:3], inner.predict(mixed)[:3])
    assert choose(GuardedRouter(router, 2, 0.1).predict(mixed)).tolist() == [1, 1, 1, 2, 2, 2]
    assert (router.name, router.unit) == (inner.name, inner.unit)


def labelled(n: int, seed: int) -> RoutingExamples:
    """Two kinds of text, left and right of the origin; expert 0 is best on the one, 1 on the other."""
    kind = torch.arange(n) % 2
    vectors = cloud(n, seed) + torch.where(kind[:, None] == 0, -1.0, 1.0) * torch.tensor([2.0] + [0.0] * 7)
    losses = torch.ones(n, 3)
    losses[torch.arange(n), kind] = 0.0
    names = tuple(str(row) for row in range(n))
    return RoutingExamples(VectorFeatures(vectors), losses, names, None, tuple("lr"[k] for k in kind.tolist()))


def test_what_is_of_no_certain_kind_is_novel_where_there_are_labels(tmp_path: Path):
    between = VectorFeatures(torch.zeros(1, 8))
    apart = fit_novelty(labelled(200, 0), labelled(200, 1), 0.99)
    assert not bool(apart.measure(between) > apart.levels[0].threshold)  # it lies near enough
    assert bool(apart.novel(between).all())
    known = labelled(400, 2).features
    assert float(apart.novel(known).float().mean()) < 0.08
    unlabelled = [replace(labelled(200, seed), label=None) for seed in (0, 1)]
    assert not bool(fit_novelty(*unlabelled, 0.99).novel(between).any())
    router = NoveltyRouter(fit_constant(labelled(200, 0)), 2, apart)
    save_router(router, tmp_path)
    again = load_router(tmp_path)
    mixed = VectorFeatures(torch.cat([known.pooled()[:20], torch.zeros(1, 8)]))
    assert torch.equal(again.predict(mixed), router.predict(mixed))
    assert choose(again.predict(mixed))[-1] == 2


def test_the_classifier_of_domains_is_asked_about_the_choice():
    """Expert 0 is for the left, 1 for the right, and 2, the fallback, costs as much as the wrong one of them."""
    train, validation, seen = (labelled(200, seed) for seed in (0, 1, 2))
    for part in (train, validation):
        part.losses[:, 2] = 0.5
    novelty = fit_novelty(train, validation, 0.99)
    assert novelty.kinds is not None
    x = seen.features.pooled()[:, 0]
    left, right = x < -2.0, x > 2.0  # of these the classifier is sure
    known = ~novelty.novel(seen.features)
    assert bool(known[left | right].any())
    for always, right_there, wrong_there in ((0, left, right), (1, right, left)):
        inner = Constant(torch.tensor([float(expert != always) for expert in range(3)]))
        choice = choose(NoveltyRouter(inner, 2, novelty).predict(seen.features))
        assert set(choice[right_there & known].tolist()) == {always}
        assert set(choice[wrong_there].tolist()) == {2}
    unlabelled = [replace(part, label=None) for part in (train, validation)]
    free = NoveltyRouter(Constant(torch.tensor([0.0, 1.0, 1.0])), 2, fit_novelty(*unlabelled, 0.99))
    assert float((choose(free.predict(seen.features)) == 0).float().mean()) > 0.9


def test_what_is_refused_is_asked_of_the_choice_alone():
    costs = torch.tensor([[0.0, 1.0, 2.0], [1.0, 0.0, 2.0], [0.0, 1.0, 2.0]])
    refused = torch.tensor([[False, True, True], [False, True, False], [True, False, False]])
    assert choose(settle(costs, 2, refused)).tolist() == [0, 2, 2]
    assert choose(settle(costs, 2, torch.tensor([[False], [True], [False]]))).tolist() == [0, 2, 0]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31), st.integers(0, 3))
def test_prefer_changes_one_column_of_the_given_rows(seed: int, expert: int):
    costs = torch.randn(9, 4, generator=torch.Generator().manual_seed(seed))
    rows = torch.arange(9) % 2 == 0
    preferred = prefer(costs, expert, rows)
    assert set(choose(preferred)[rows].tolist()) == {expert}
    assert torch.equal(preferred[~rows], costs[~rows])
    others = [column for column in range(4) if column != expert]
    assert torch.equal(preferred[:, others], costs[:, others])
    assert float((preferred.min(1).values - costs.min(1).values).abs().max()) < 1e-6


def test_a_constant_router_on_an_expert_that_is_not_the_best(planted):
    found = fit_constant(planted(20, 0.1, 1), 2)
    assert set(choose(found.predict(planted(5, 0.1, 2).features)).tolist()) == {2}
    best = planted(20, 0.1, 1).best_single
    assert torch.equal(fit_constant(planted(20, 0.1, 1), best).costs, fit_constant(planted(20, 0.1, 1)).costs)


@pytest.mark.parametrize("guarded", [True, False])
def test_saved_and_read_again(planted, tmp_path, guarded):
    train, validation, test = planted(40, 0.1, 1), planted(20, 0.1, 2), planted(30, 0.1, 3)
    inside = NoveltyRouter(fit_linear(train, validation), 1, fit_novelty(train, validation, 0.5))
    router = GuardedRouter(inside, 1, 0.01) if guarded else inside
    assert 0 < int(inside.novelty.novel(test.features).sum()) < 30
    save_router(router, tmp_path / "one")
    again = load_router(tmp_path / "one")
    assert torch.equal(again.predict(test.features), router.predict(test.features))
    save_router(again, tmp_path / "two")
    for file in ("router.json", "router.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_what_is_inside_and_around():
    inner = Constant(torch.zeros(2))
    novelty = fit_novelty(examples(cloud(9, 0), experts=2), examples(cloud(9, 1), experts=2), 0.9)
    outer = GuardedRouter(NoveltyRouter(inner, 0, novelty), 0, 0.5)
    assert innermost(outer) is innermost(inner) is inner
    assert novelty_of(outer) is outer.router
    assert novelty_of(GuardedRouter(inner, 0, 0.5)) is None
    other = with_innermost(outer, Constant(torch.ones(2)))
    assert isinstance(other, GuardedRouter)
    assert other.margin == 0.5
    assert novelty_of(other) == NoveltyRouter(innermost(other), 0, novelty)
    assert float(innermost(other).costs[0]) == 1.0


def test_tuned_falls_back_to_the_generalist_on_what_is_new(planted):
    """The known inputs have a clear best expert each; shifted ones are like nothing the router has seen."""
    train, validation = planted(96, 0.2, 1), planted(48, 0.2, 2)
    fallback = (validation.best_single + 1) % 3
    fitted = fit_tuned(Options(objective="expected_loss", epochs=4), train, validation, 0, fallback=fallback)
    known = planted(60, 0.2, 3).features
    assert isinstance(known, TokenFeatures)
    strange = TokenFeatures(known.tokens, known.embedding + 4.0)
    assert fitted.guard is not None
    assert fitted.guard.fallback == fallback
    assert len(set(choose(fitted.router.predict(known)).tolist())) == 3
    assert set(choose(fitted.router.predict(strange)).tolist()) == {fallback}
    assert set(choose(fitted.unguarded.predict(strange)).tolist()) == {fallback}
    found = fitted.to_json()["novelty"]
    assert (found["quantile"], found["neighbours"]) == (0.99, 5)
    assert 0.0 <= found["novel"] < 0.2

    everywhere = fit_tuned(
        Options(objective="expected_loss", epochs=4, novelty=None), train, validation, 0, fallback=fallback
    )
    assert everywhere.to_json()["novelty"] is None
    assert novelty_of(everywhere.router) is None
    today = fit_tuned(Options(objective="expected_loss", epochs=4), train, validation, 0)
    assert today.novelty is None
    assert today.guard is not None
    assert today.guard.fallback == validation.best_single


def test_unseen_choices_know_of_novelty(planted):
    train, validation = planted(96, 0.2, 1), planted(48, 0.2, 2)
    options = Options(objective="expected_loss", epochs=4, novelty=0.5)
    fitted = fit_tuned(options, train, validation, 0, fallback=1)
    assert fitted.novelty is not None
    novel = fitted.novelty.novel
    assert 0.3 < float(novel.float().mean()) < 0.7
    assert set(fitted.unseen.choice[novel].tolist()) == {1}
    assert len(set(fitted.unseen.choice[~novel].tolist())) == 3
    pool = train.join(validation)
    found, refused = refused_unseen(pool, folds_by_document(pool.document, 4, 0), 0.5, 1)
    assert torch.equal(novel, found)
    assert torch.equal(refused, found[:, None].expand(-1, 3))  # these documents have no labels: nobody doubts a choice


@pytest.mark.parametrize("fit", [fit_paper, fit_tuned])
def test_a_guard_that_refuses_leaves_the_generalist_even_where_it_is_not_the_best(planted, fit):
    """Nothing can be learnt, and expert 2 is the worst by a hair; it is the generalist."""
    train, validation = planted(96, 0.0, 1), planted(48, 0.0, 2)
    for part in (train, validation):
        part.losses[:, :2] = part.losses[:, 2:] - 1e-9
    fitted = fit(Options(epochs=1), train, validation, 0, fallback=2)
    assert set(choose(fitted.router.predict(train.features)).tolist()) == {2}
    assert set(fitted.unseen.choice.tolist()) == {2}
    assert all(candidate.gain.value == pytest.approx(0.0, abs=1e-6) for candidate in fitted.candidates)


def test_the_papers_router_is_left_as_it_is(planted):
    fitted = fit_paper(Options(preset="paper", epochs=1), planted(48, 0.2, 1), planted(24, 0.2, 2), 0, fallback=0)
    assert fitted.novelty is None
    assert novelty_of(fitted.router) is None


TEXTS = ("code", "docstrings", "topics")


@pytest.fixture(scope="module")
def bundled() -> dict[tuple[str, str], RoutingExamples]:
    """Windows of the bundled texts that routers may read, by text and part: their first 64 tokens."""
    decoder = Decoder.open("bundled:tiny-qwen3")
    embedding = decoder.embedding()
    found = {}
    for name in TEXTS:
        for part in ("router", "test"):
            documents = list(islice(bundled_documents(f"bundled:python-{name}/{part}"), 30))
            samples = pack_windows(documents, decoder.tokenizer, 128, 60, 0)
            features = TokenFeatures(samples.tokens[:, :64], embedding)
            found[name, part] = RoutingExamples(features, torch.zeros(len(samples), 2), samples.document)
    return found


@pytest.mark.parametrize(("held_out", "at_least"), [("code", 0.8), ("docstrings", 0.65), ("topics", 0.55)])
def test_a_bundled_text_left_out_is_told_from_known_ones(bundled, held_out, at_least):
    """The header's measurement in small: area under the curve."""
    one, two = (name for name in TEXTS if name != held_out)
    known = bundled[one, "test"].join(bundled[two, "test"])
    novelty = fit_novelty(bundled[one, "router"].join(bundled[two, "router"]), known, 0.99)
    of_known, of_other = (novelty.measure(part.features) for part in (known, bundled[held_out, "test"]))
    assert float((of_other[:, None] > of_known[None]).double().mean()) > at_least


def test_standardised_like_knn():
    novelty = fit_novelty(examples(cloud(20, 0, centre=3.0)), examples(cloud(20, 1, centre=3.0)), 0.9)
    assert isinstance(novelty.standardise, Standardiser)
    assert float(novelty.keys.mean(0).abs().max()) < 1e-6
    assert float(novelty.keys.std(0, correction=0).sub(1).abs().max()) < 1e-5
