from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from moqe.errors import ProtocolError
from moqe.evaluate import ProtocolVerdict
from moqe.evaluate.loss_table import LossTable

Tables = Callable[..., LossTable]
Judged = Callable[..., ProtocolVerdict]
Choices = Callable[[LossTable], np.ndarray]


def test_every_number_by_hand(by_hand: Tables, judged: Judged) -> None:
    # nats of (rtn, gptq) on four samples of ten tokens, one sample a document; first halves beside
    test = by_hand(
        [[20.0, 22.0], [30.0, 26.0], [24.0, 24.5], [26.0, 23.5]],
        [19.0, 25.0, 23.0, 23.0],
        halves=[[12.0, 11.0], [15.0, 14.0], [13.0, 12.0], [12.0, 13.0]],
        domains=["code", "prose", "code", "prose"],
    )
    choice = np.array([0, 1, 1, 1])
    found = judged(test, test, {"mixture": choice, "constant": np.zeros(4, np.int64)}, 0, 200)
    assert found.base == pytest.approx(90 / 40)
    assert found.experts == pytest.approx({"rtn": 100 / 40, "gptq": 96 / 40})
    assert (found.best_single, found.best_single_on_test) == ("gptq", "gptq")
    assert found.mixture.value == pytest.approx(94 / 40)
    assert found.mixture.share == {"rtn": 0.25, "gptq": 0.75}
    assert found.difference.value == pytest.approx(-2 / 40)
    assert found.difference_to_base.value == pytest.approx(4 / 40)
    assert found.oracle == pytest.approx((20 + 26 + 24 + 23.5) / 40)
    # first halves choose gptq gptq gptq rtn for the second halves, second halves choose rtn gptq rtn gptq
    second_halves = (22 - 11) + (26 - 14) + (24.5 - 12) + (26 - 12)
    first_halves = 12.0 + 14 + 13 + 13
    assert found.split_half_oracle == pytest.approx((second_halves + first_halves) / 40)
    assert found.random == pytest.approx(98 / 40)
    assert found.uniform == pytest.approx((0.25 * 100 + 0.75 * 96) / 40)
    assert found.constant == pytest.approx(100 / 40)
    assert found.oracle_gap.value == pytest.approx(2.5 / 40)
    code, prose = found.domains
    assert (code.domain, code.n_samples, code.n_documents) == ("code", 2, 2)
    assert code.base == pytest.approx(42 / 20)
    assert code.best_single == pytest.approx(46.5 / 20)
    assert code.mixture == pytest.approx(44.5 / 20)
    assert code.share == {"rtn": 0.5, "gptq": 0.5}
    assert prose.difference.value == 0.0
    mixture = next(line for line in found.lines if line.kind == "mixture")
    assert mixture.perplexity == pytest.approx(np.exp(94 / 40))
    assert mixture.bits_per_byte == pytest.approx(94 / np.log(2) / 160)
    assert [line.name for line in found.lines] == [
        *("base", "rtn", "gptq", "mixture", "constant", "random", "uniform", "oracle", "split-half oracle")
    ]
    assert [line.name for line in found.lines if line.difference is None] == ["gptq"]


def test_best_single_is_chosen_on_validation(by_hand: Tables, judged: Judged) -> None:
    test = by_hand([[10.0, 20.0], [10.0, 20.0]], [9.0, 9.0])
    validation = by_hand([[20.0, 10.0]], [9.0])
    found = judged(test, validation, {"mixture": np.array([0, 1])}, 0, 100)
    assert (found.best_single, found.best_single_on_test) == ("gptq", "rtn")
    assert found.difference.value == pytest.approx(-0.5)


def test_a_router_that_knows_the_domain_wins_and_recovers_most_of_the_gap(
    simulated: Tables, domain_choice: Choices, judged: Judged
) -> None:
    test = simulated(0)
    found = judged(test, simulated(1), {"mixture": domain_choice(test)}, 0, 500)
    assert found.wins
    assert found.difference.high is not None
    assert found.difference.high < 0
    assert found.difference.p is not None
    assert found.difference.p < 0.001
    assert "wins by" in found.sentence
    assert found.oracle_share is not None
    assert 0.8 < found.oracle_share.value <= 1.0
    assert found.split_half_share is not None
    assert found.oracle_share.low is not None
    assert found.oracle_share.low < found.oracle_share.value < (found.oracle_share.high or 0)
    assert found.difference.n_documents == 40
    assert found.oracle <= found.mixture.value <= found.experts[found.best_single]
    assert found.split_half_oracle is not None
    assert found.oracle < found.split_half_oracle


@pytest.mark.parametrize("seed", range(5))
def test_on_noise_no_win_is_claimed_and_the_oracle_gap_is_not_real(
    simulated: Tables, seed: int, judged: Judged
) -> None:
    test = simulated(seed, signal=0.0)
    choice = np.random.default_rng(seed).integers(0, 3, len(test))
    found = judged(test, simulated(seed + 100, signal=0.0), {"mixture": choice}, seed, 300)
    assert "does not win" in found.sentence
    assert not found.wins
    assert found.oracle_gap.value > 0  # the oracle always looks better; that is why the split-half one stands beside it


def test_a_mixture_that_is_the_best_expert_differs_by_exactly_nothing(simulated: Tables, judged: Judged) -> None:
    test = simulated(3)
    best = int(test.loss.sum(0).argmin())
    found = judged(test, test, {"mixture": np.full(len(test), best)}, 0, 200)
    assert (found.difference.value, found.difference.low, found.difference.high) == (0.0, 0.0, 0.0)
    assert not found.wins
    assert f"every sample goes to {test.experts[best]}" in found.sentence


def test_equal_experts_leave_no_gap_to_recover(by_hand: Tables, judged: Judged) -> None:
    test = by_hand([[20.0, 20.0]] * 8, [19.0] * 8)
    found = judged(test, test, {"mixture": np.arange(8) % 2}, 0, 100)
    assert found.oracle_share is None
    assert found.split_half_share is None
    assert "does not win" in found.sentence


def test_a_worse_mixture_is_called_worse(simulated: Tables, domain_choice: Choices, judged: Judged) -> None:
    test = simulated(0)
    found = judged(test, test, {"mixture": (domain_choice(test) + 1) % 3}, 0, 300)
    assert not found.wins
    assert "worse than" in found.sentence or "includes zero" in found.sentence
    worse = replace(test, loss=test.loss + np.array([0.0, 50.0, 50.0]))
    assert "worse than awq" in judged(worse, worse, {"mixture": np.ones(len(test), np.int64)}, 0, 300).sentence


def test_few_documents_claim_nothing(simulated: Tables, domain_choice: Choices, judged: Judged) -> None:
    test = simulated(0, documents=5)
    found = judged(test, test, {"mixture": domain_choice(test)}, 0, 300)
    assert found.difference.value < 0
    assert not found.wins
    assert "too few" in found.sentence


def test_every_router_gets_a_line_and_its_shares(simulated: Tables, domain_choice: Choices, judged: Judged) -> None:
    test = simulated(0)
    choices = {
        "mixture": domain_choice(test),
        "paper": np.zeros(len(test), np.int64),
        "knn": domain_choice(test),
        "constant": np.ones(len(test), np.int64),
    }
    found = judged(test, test, choices, 0, 200)
    assert set(found.routers) == {"paper", "knn", "constant"}
    assert found.routers["paper"].share == {"awq": 1.0, "gptq": 0.0, "rtn": 0.0}
    assert found.routers["knn"].value == found.mixture.value
    kinds = {line.name: line.kind for line in found.lines}
    assert (kinds["paper"], kinds["constant"]) == ("router", "no skill")


def test_a_router_named_like_an_expert_is_kept_apart(by_hand: Tables, judged: Judged) -> None:
    test = by_hand([[20.0, 30.0]] * 6, [19.0] * 6, experts=("linear", "knn"))
    ones = np.ones(6, np.int64)
    found = judged(test, test, {"mixture": np.zeros(6, np.int64), "linear": ones, "random": ones}, 0, 100)
    assert found.experts["linear"] == pytest.approx(2.0)
    assert found.routers["linear"].value == pytest.approx(3.0)
    assert found.routers["random"].value == pytest.approx(3.0)
    assert found.random == pytest.approx(2.5)


def test_for_accuracy_higher_is_better(by_hand: Tables, judged: Judged) -> None:
    correct = [[1.0, 0.0], [0.0, 1.0]] * 10
    test = by_hand(correct, [1.0] * 20, tokens=1.0, metric="top1")
    validation = by_hand([[1.0, 0.0]], [1.0], tokens=1.0, metric="top1")
    found = judged(test, validation, {"mixture": np.arange(20) % 2}, 0, 200)
    assert found.oracle == 1.0
    assert found.difference.value == 0.5
    assert found.wins
    assert found.lines[0].perplexity is None


def test_tables_that_do_not_belong_together_are_refused(simulated: Tables, judged: Judged) -> None:
    test = simulated(0)
    choices = {"mixture": np.zeros(len(test), np.int64)}
    with pytest.raises(ProtocolError, match="runtime"):
        judged(test, replace(test, runtime="packed"), choices, 0, 100)
    with pytest.raises(ProtocolError, match="mixture"):
        judged(test, test, {}, 0, 100)
    with pytest.raises(ProtocolError, match="route these samples again"):
        judged(test, test, {"mixture": np.zeros(3, np.int64)}, 0, 100)
    with pytest.raises(ProtocolError, match="route these samples again"):
        judged(test, test, {"mixture": np.full(len(test), 7)}, 0, 100)


def test_the_routing_curve_by_hand(by_hand: Tables, judged: Judged) -> None:
    # leaving gptq (index 1) saves 4 on sample 0, costs 2 on sample 1, and changes nothing on sample 2
    test = by_hand([[16.0, 20.0], [22.0, 20.0], [20.0, 20.0]], [15.0] * 3)
    validation = by_hand([[20.0, 10.0]], [9.0])
    predicted = np.array([[0.0, 3.0], [0.0, 5.0], [0.0, -1.0]])  # the router stays with gptq on sample 2 only
    curve = judged(test, validation, {"mixture": np.array([0, 1, 1])}, 0, 100, predicted=predicted).curve
    assert curve is not None
    assert curve.share == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert curve.predicted == pytest.approx([60 / 30, 62 / 30, 58 / 30, 58 / 30])
    assert curve.random == pytest.approx([60 / 30, (60 - 2 / 3) / 30, (60 - 4 / 3) / 30, 58 / 30])
    assert curve.oracle == pytest.approx([60 / 30, 56 / 30, 56 / 30, 56 / 30])
    assert curve.deployed_share == pytest.approx(1 / 3)
    assert curve.deployed_value == pytest.approx(56 / 30)
