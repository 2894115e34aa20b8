import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moqe.errors import CheckpointError, DataError, RecipeError
from moqe.router import Cascade, choose, fit_cascade, fit_guarded_cascade, load_cascade, save_cascade
from moqe.router.cascade import _affordable

EXPERTS, CLASSES = 3, 4


def draw(n: int, seed: int, experts: int = EXPERTS, classes: int = CLASSES):
    """A choice, probabilities and labels; each expert knows the label a bit, with noise of its own."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (n,), generator=generator)
    logits = 2.0 * torch.randn(n, experts, classes, generator=generator)
    logits += 3.0 * torch.nn.functional.one_hot(labels, classes)[:, None]
    return torch.randint(0, experts, (n,), generator=generator), logits.softmax(2), labels


def right(probabilities: torch.Tensor, labels: torch.Tensor) -> int:
    return int((probabilities.argmax(1) == labels).sum())


cases = st.tuples(st.integers(2, 80), st.integers(0, 10_000), st.integers(2, 5), st.floats(1.0, 2.0))


@given(cases)
@settings(deadline=None, max_examples=60)
def test_threshold_zero_is_the_routers_answer_and_one_is_always_two(case):
    n, seed, experts, _ = case
    choice, probabilities, _ = draw(n, seed, experts)
    second = tuple((i + 1) % experts for i in range(experts))
    rows = torch.arange(n)
    never = Cascade(0.0, second).answer(choice, probabilities)
    assert torch.equal(never.probabilities, probabilities[rows, choice])
    assert torch.equal(never.cost, torch.ones(n, dtype=torch.float64))
    always = Cascade(1.0, second).answer(choice, probabilities)
    assert bool(always.second_used.all())
    expected = (probabilities[rows, choice] + probabilities[rows, (choice + 1) % experts]) / 2
    torch.testing.assert_close(always.probabilities, expected)


@given(cases)
@settings(deadline=None, max_examples=60)
def test_a_fitted_cascade_keeps_the_cap_and_loses_nothing_where_it_was_fitted(case):
    n, seed, experts, max_cost = case
    choice, probabilities, labels = draw(n, seed, experts)
    cascade = fit_cascade(choice, probabilities, labels, max_cost)
    answer = cascade.answer(choice, probabilities)
    assert float(answer.cost.mean()) <= max_cost + 1e-9
    assert float(answer.cost.mean()) == pytest.approx(1 + float(answer.second_used.double().mean()))
    assert right(answer.probabilities, labels) >= right(probabilities[torch.arange(n), choice], labels)
    assert all(second != first for first, second in enumerate(cascade.second))
    torch.testing.assert_close(answer.probabilities.sum(1), torch.ones(n))


@given(cases)
@settings(deadline=None, max_examples=30)
def test_no_affordable_threshold_is_better_and_none_as_good_is_cheaper(case):
    n, seed, experts, max_cost = case
    choice, probabilities, labels = draw(n, seed, experts)
    cascade = fit_cascade(choice, probabilities, labels, max_cost)
    best = cascade.answer(choice, probabilities)
    allowed = _affordable(n, max_cost)
    for threshold in [0.0, *probabilities.amax(2).flatten().tolist()]:
        other = Cascade(threshold, cascade.second).answer(choice, probabilities)
        if int(other.second_used.sum()) <= allowed:
            assert right(other.probabilities, labels) <= right(best.probabilities, labels)
            if right(other.probabilities, labels) == right(best.probabilities, labels):
                assert int(other.second_used.sum()) >= int(best.second_used.sum())


def test_threshold_one_asks_even_after_a_probability_of_one():
    certain = torch.tensor([[1.0, 0.0]])
    assert Cascade(1.0, (1, 0)).unsure(certain).tolist() == [True]
    assert Cascade(0.999, (1, 0)).unsure(certain).tolist() == [False]


def test_equal_top_probabilities_are_asked_about_together():
    """Ten samples with a top of 0.6, of which half can be afforded, hence none."""
    probabilities = torch.tensor([[[0.6, 0.4], [0.1, 0.9]]]).expand(10, -1, -1)
    choice, labels = torch.zeros(10, dtype=torch.int64), torch.ones(10, dtype=torch.int64)
    assert fit_cascade(choice, probabilities, labels, 1.8).threshold == 0.0
    assert fit_cascade(choice, probabilities, labels, 2.0) == Cascade(1.0, (1, 0))


def test_probabilities_that_are_neighbours_are_told_apart():
    low = torch.tensor(0.6)
    for _ in range(2):  # the mean of two neighbours rounds to the upper one for one pair of two
        high = torch.nextafter(low, torch.tensor(1.0))
        tops = torch.stack([low] * 10 + [high] * 10)
        first = torch.stack([tops, 1 - tops], 1)
        probabilities = torch.stack([first, torch.tensor([0.1, 0.9]).expand(20, -1)], 1)
        choice, labels = torch.zeros(20, dtype=torch.int64), torch.ones(20, dtype=torch.int64)
        cascade = fit_cascade(choice, probabilities, labels, 1.75)
        assert cascade.answer(choice, probabilities).second_used.tolist() == [True] * 10 + [False] * 10
        low = high


def test_partners_are_those_that_help_most_where_the_first_is_unsure():
    """Expert 0 is unsure on the last 40; there expert 1 is right and expert 2 is not, on the other 60 the reverse."""
    sure, unsure = torch.tensor([0.85, 0.15]), torch.tensor([0.52, 0.48])
    yes, no = torch.tensor([0.1, 0.9]), torch.tensor([0.9, 0.1])
    first, second = torch.stack([sure, no, yes]), torch.stack([unsure, yes, no])
    probabilities = torch.cat([first.expand(60, -1, -1), second.expand(40, -1, -1)])
    labels = torch.ones(100, dtype=torch.int64)
    cascade = fit_cascade(torch.zeros(100, dtype=torch.int64), probabilities, labels, 1.55)
    assert cascade.second[0] == 1
    assert 0.52 <= cascade.threshold < 0.85
    answer = cascade.answer(torch.zeros(100, dtype=torch.int64), probabilities)
    assert right(answer.probabilities, labels) == 40
    assert answer.second_used.tolist() == [False] * 60 + [True] * 40


def test_the_cap_holds_for_new_samples_nearly_always():
    over = 0
    for seed in range(60):
        choice, probabilities, labels = draw(400, 2 * seed)
        cascade = fit_cascade(choice, probabilities, labels, 1.1)
        choice, probabilities, _ = draw(4000, 2 * seed + 1)
        over += float(cascade.answer(choice, probabilities).cost.mean()) > 1.1
    assert over <= 6


def test_how_many_may_be_asked():
    assert _affordable(1000, 1.0) == 0
    assert _affordable(1000, 2.0) == 1000
    assert _affordable(1000, 1.1) < 100
    assert _affordable(100_000, 1.1) == pytest.approx(10_000, rel=0.02)


def test_a_cascade_that_helps_is_kept_and_helps_on_new_samples():
    choice, probabilities, labels = draw(2000, 1)
    decision = fit_guarded_cascade(choice, probabilities, labels, 1.2)
    assert decision.kept
    assert decision.gain.value > decision.gain.standard_error
    choice, probabilities, labels = draw(2000, 2)
    answer = decision.cascade.answer(choice, probabilities)
    plain = right(probabilities[torch.arange(2000), choice], labels)
    assert right(answer.probabilities, labels) > plain + 10
    assert decision.cost == pytest.approx(float(answer.cost.mean()), abs=0.03)


def test_experts_that_are_all_the_same_leave_the_plain_route():
    choice, probabilities, labels = draw(300, 3, experts=1)
    decision = fit_guarded_cascade(choice, probabilities.expand(-1, 3, -1), labels, 1.5)
    assert not decision.kept
    assert (decision.cascade.threshold, decision.cascade.always_first, decision.cost) == (0.0, None, 1.0)


def test_second_experts_that_only_guess_are_mostly_refused():
    """Whoever judged a cascade where it was fitted would keep it nearly always: some threshold gained by luck."""
    kept = 0
    for seed in range(40):
        choice, probabilities, labels = draw(200, seed)
        kept += fit_guarded_cascade(choice, probabilities, labels.flip(0), 1.5).kept
    assert kept <= 14


def test_a_router_that_loses_answers_is_not_asked_first_and_one_that_wins_is():
    _, probabilities, labels = draw(600, 4)
    answers = probabilities.argmax(2) == labels[:, None]  # (n, experts)
    bad, good = choose(answers.float()), choose(-answers.float())
    single = int(answers.double().mean(0).argmax())
    decision = fit_guarded_cascade(bad, probabilities, labels, 1.1)
    assert decision.cascade.always_first == single
    assert set(decision.cascade.first(bad).tolist()) == {single}
    assert fit_guarded_cascade(good, probabilities, labels, 1.1).cascade.always_first is None


def test_choices_of_samples_that_the_router_has_seen_are_not_believed():
    """A choice that is perfect where the router was fitted and bad elsewhere."""
    choice, probabilities, labels = draw(600, 5)
    answers = (probabilities.argmax(2) == labels[:, None]).float()
    unseen = torch.arange(600) >= 450
    choice = torch.where(unseen, choose(answers), choose(-answers))
    assert fit_guarded_cascade(choice, probabilities, labels, 1.1).cascade.always_first is None
    assert fit_guarded_cascade(choice, probabilities, labels, 1.1, unseen).cascade.always_first is not None


def test_two_fits_are_equal():
    arguments = draw(200, 6)
    assert fit_guarded_cascade(*arguments, 1.2, seed=3) == fit_guarded_cascade(*arguments, 1.2, seed=3)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"choice": torch.zeros(3, dtype=torch.int64)}, DataError, "3 choices, 20 rows of probabilities and 20 labels"),
        ({"max_cost": 0.9}, RecipeError, r"router\.max_cost is 0\.9"),
        ({"max_cost": 2.5}, RecipeError, r"router\.max_cost is 2\.5"),
        ({"probabilities": torch.ones(20, 1, 4) / 4}, RecipeError, "needs two experts or more"),
    ],
)
def test_what_cannot_be_fitted(change, error, message):
    choice, probabilities, labels = draw(20, 7)
    arguments = {"choice": choice, "probabilities": probabilities, "labels": labels, "max_cost": 1.5} | change
    with pytest.raises(error, match=message):
        fit_cascade(**arguments)
    with pytest.raises(error, match=message):
        fit_guarded_cascade(**arguments)


def test_too_few_samples():
    nothing = torch.zeros(0, dtype=torch.int64)
    with pytest.raises(DataError, match="no samples"):
        fit_cascade(nothing, torch.zeros(0, 3, 4), nothing, 1.5)
    with pytest.raises(DataError, match="needs at least 10 samples new to the router, and there are 9: add images"):
        fit_guarded_cascade(*draw(20, 8), 1.5, torch.arange(20) < 9)


def test_a_saved_cascade_is_the_same(tmp_path):
    decision = fit_guarded_cascade(*draw(500, 9), 1.2)
    save_cascade(decision, tmp_path)
    assert load_cascade(tmp_path, EXPERTS) == decision.cascade
    content = json.loads((tmp_path / "policy.json").read_text())
    assert content["gain"]["value"] == decision.gain.value
    assert content["cost"] == decision.cost


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "another version or policy"),
        ({"policy": "probe"}, "another version or policy"),
        ({"threshold": None}, "does not describe a cascade"),
        ({"second": [1, 2]}, "not for these 3 experts"),
        ({"second": [1, 2, 3]}, "not for these 3 experts"),
        ({"second": [0, 2, 1]}, "not for these 3 experts"),
        ({"always_first": 3}, "not for these 3 experts"),
    ],
)
def test_a_file_that_does_not_fit_is_an_error(tmp_path, change, message):
    save_cascade(fit_guarded_cascade(*draw(100, 9), 1.2), tmp_path)
    path = tmp_path / "policy.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=message):
        load_cascade(tmp_path, EXPERTS)


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        load_cascade(tmp_path, EXPERTS)
