"""What is predicted from measured losses: gains, their bounds, growth, and the sentence."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from moqe.advice import Range, Row
from moqe.advice.advice import advise_sentence
from moqe.advice.codes import bits_per_weight
from moqe.advice.measurement import Scored, Scores, Width, _growth, promise
from moqe.advice.prediction import Predictor, Size, gap_at, growth_of
from moqe.methods.distill import Targets
from moqe.methods.distill.targets import BaseAnswers

POINTS = np.array([bits_per_weight(bits) for bits in (3, 4, 8)])


def test_the_gap_between_widths_is_log_linear_and_goes_on_beyond() -> None:
    gaps = np.array([[0.4, 0.1, 0.001]])
    assert gap_at(POINTS, gaps, POINTS[1])[0] == pytest.approx(0.1)
    middle = float(gap_at(POINTS, gaps, (POINTS[0] + POINTS[1]) / 2)[0])
    assert middle == pytest.approx(math.sqrt(0.4 * 0.1))
    assert gap_at(POINTS, gaps, POINTS[2] + 1)[0] < 0.001
    assert gap_at(POINTS[:1], gaps[:, :1], POINTS[0] + 1)[0] == pytest.approx(0.1)  # a quarter of the power per bit


def measured(
    gain: float, noise: float, *, specialists: int = 2, growth: float = math.nan
) -> tuple[list[Width], Scored]:
    """Losses of 120 windows in 60 documents and two labels, whose specialists gain `gain` nats at 4 bits."""
    generator = np.random.default_rng(0)
    n = 120
    label = np.array(["a", "b"] * (n // 2))
    base = generator.uniform(2, 4, n)
    widths = []
    for bits, gap in ((3, 0.4), (4, 0.1), (8, 0.001)):
        nats = base + gap + generator.normal(0, noise, n)
        special = {}
        if bits == 4:
            for name in ("a", "b")[:specialists]:
                won = gain + generator.normal(0, noise, n)
                mine = label == name
                special[name] = Scores(
                    np.where(mine, nats - won, np.nan), np.where(mine, gap - gain + 0.1 * (gain - won), np.nan)
                )
        widths.append(Width(bits, "gptq", gap, Scores(nats, np.full(n, gap)), special, 48, growth))
    document = np.array([f"d{index // 2}" for index in range(n)])
    targets = Targets(BaseAnswers(lambda: torch.empty(0)), torch.float32)
    judging = np.arange(n) >= 40
    return widths, Scored(torch.zeros(n, 4), label, label, document, judging, targets, base, torch.float32)


def predictor(widths: list[Width], scored: Scored, *, growth: float = 1.0, own: float = 0.0) -> Predictor:
    return Predictor(widths, scored, {bits: Size(1000.0, 60.0) for bits in (3, 4, 8)}, growth, own, 0)


def test_a_gain_is_found_and_set_beside_one_model_of_the_same_storage() -> None:
    widths, scored = measured(0.05, 0.005)
    row = predictor(widths, scored).row(widths[1], 3)
    assert row.gain.value == pytest.approx(0.05, abs=0.003)
    assert row.gain.above_zero
    assert row.memory_ratio == pytest.approx(1.12)
    left = float(gap_at(POINTS, np.array([[0.4, 0.1, 0.001]]), POINTS[1] + 0.5)[0])
    assert row.storage_gain.value == pytest.approx(0.1 - left, abs=0.003)
    assert row.beyond_storage.value == pytest.approx(row.gain.value - row.storage_gain.value)
    assert row.extrapolated == ()
    assert row.pays_by_bandwidth


@pytest.mark.parametrize(
    ("gain", "bandwidth", "storage"), [(0.08, True, True), (0.02, True, False), (0.0, False, False)]
)
def test_by_which_view_a_mixture_pays(gain: float, bandwidth: bool, storage: bool) -> None:
    widths, scored = measured(gain, 0.005)
    row = predictor(widths, scored).row(widths[1], 3)
    assert (row.pays_by_bandwidth, row.pays_by_storage) == (bandwidth, storage)
    said = advise_sentence((row,))
    assert said.startswith("Worth it" if bandwidth else "Not worth it here")
    assert ("by storage and by bytes read" in said) == storage
    assert ("Not worth it where storage is the limit" in said) == (bandwidth and not storage)


def test_fewer_experts_keep_the_specialists_that_help_most() -> None:
    widths, scored = measured(0.05, 0.005)
    found = predictor(widths, scored)
    two, three = found.row(widths[1], 2), found.row(widths[1], 3)
    assert two.gain.value == pytest.approx(three.gain.value / 2, abs=0.003)
    assert two.extrapolated == three.extrapolated == ()


def shifted(scores: Scores, rows: np.ndarray, divergence: float) -> Scores:
    """Scores with another divergence at some windows."""
    return Scores(scores.nats, np.where(rows, scores.divergence + divergence, scores.divergence))


def test_who_answers_is_decided_on_the_choice_windows_alone() -> None:
    widths, scored = measured(0.02, 0.002)
    four = widths[1]
    better = shifted(four.specialists["b"], ~scored.judging, -0.02)  # it looks best, and on judging it is not
    worse = shifted(better, scored.judging, 0.01)
    one = replace(four, specialists={"a": four.specialists["a"], "b": worse})
    row = predictor([widths[0], one, widths[2]], scored).row(one, 2)
    assert row.gain.value == pytest.approx(0.005, abs=0.001)
    never = replace(four, specialists={"a": shifted(four.specialists["a"], ~scored.judging, 0.05)})
    row = predictor([widths[0], never, widths[2]], scored).row(never, 2)
    assert row.gain.value == 0


def test_extrapolation_widens_upwards_and_never_beyond_the_gap() -> None:
    widths, scored = measured(0.02, 0.002)
    plain = predictor(widths, scored).row(widths[1], 3).gain
    longer = predictor(widths, scored, growth=1.4, own=2.0).row(widths[1], 3)
    assert longer.extrapolated == ("steps",)
    assert longer.gain.low == plain.low
    assert longer.gain.value == pytest.approx(plain.value * 1.4)
    assert longer.gain.high == pytest.approx(plain.high * 1.4**2)
    assert predictor(widths, scored, growth=2.0, own=9.0).row(widths[1], 3).gain.high < 0.105
    more = predictor(widths, scored).row(widths[1], 9)
    assert more.extrapolated == ("experts",)
    assert more.gain.high == pytest.approx(plain.high * math.log(9) / math.log(3))


def test_a_label_without_a_specialist_is_extrapolated_by_its_divergence() -> None:
    widths, scored = measured(0.02, 0.002, specialists=1)
    found = predictor(widths, scored)
    one, both = found.row(widths[1], 2), found.row(widths[1], 3)
    assert one.extrapolated == ()
    assert both.extrapolated == ("experts",)
    assert both.gain.high == pytest.approx(2 * one.gain.high, rel=1e-3)
    assert both.measured_gain == one.measured_gain


def test_where_experts_follow_the_text_gains_are_of_loss() -> None:
    """Specialists whose divergence grows while they predict the text better: a gain only for who follows the text."""
    widths, scored = measured(0.05, 0.002)
    four = widths[1]
    drifting = {label: Scores(scores.nats, scores.divergence + 0.2) for label, scores in four.specialists.items()}
    rounding = np.full(len(scored.base), 0.3)
    one = replace(four, specialists=drifting, rounding=rounding)
    row = predictor([widths[0], one, widths[2]], replace(scored, by_text=True)).row(one, 3)
    assert row.gain.value == pytest.approx(0.05, abs=0.001)
    assert row.gain == row.measured_gain == row.loss_gain
    left = float(gap_at(POINTS, np.array([[0.4, 0.3, 0.001]]), POINTS[1] + 0.5)[0])
    assert row.storage_gain.value == pytest.approx(0.3 - left, abs=0.003)
    assert predictor([widths[0], one, widths[2]], scored).row(one, 3).gain.value == 0.0


def test_a_gain_of_loss_has_no_bound_and_equal_labels_count_alike() -> None:
    widths, scored = measured(0.5, 0.002, specialists=1)  # more than the divergence of 0.1
    found = predictor(widths, replace(scored, by_text=True), growth=2.0, own=1.0).row(widths[1], 3)
    assert found.measured_gain.value == pytest.approx(0.25, abs=0.01)
    assert found.gain.high == pytest.approx(4 * found.measured_gain.high, rel=1e-6)
    assert found.gain.value == pytest.approx(4 * found.measured_gain.value, rel=1e-6)  # of a divergence, half: twice
    assert found.extrapolated == ("steps", "experts")


def test_a_specialist_that_the_choice_windows_do_not_like_is_not_asked() -> None:
    widths, scored = measured(-0.02, 0.002)
    row = predictor(widths, scored).row(widths[1], 3)
    assert row.gain.value == 0
    assert row.label_gain.value < 0


def test_growth_is_the_median_over_widths_within_bounds() -> None:
    widths = [measured(0.02, 0.002, growth=growth)[0][1] for growth in (1.2, 1.5, 9.0, math.nan)]
    assert growth_of(widths) == 1.5
    assert growth_of(widths[2:3]) == 2.0
    assert growth_of(widths[3:]) == 1.0
    assert growth_of([replace(widths[0], growth=0.3)]) == 1.0
    assert growth_of([replace(widths[0], growth=math.inf)]) == 2.0
    assert _growth(0.1, 0.15) == pytest.approx(1.5)
    assert _growth(-0.1, 0.15) == math.inf  # it only began to gain
    assert math.isnan(_growth(0.1, -0.1))


def test_a_gain_that_losses_contradict_or_that_is_not_worth_mentioning_does_not_pay() -> None:
    gain, small = Range(0.01, 0.02, 0.03), Range(0.0001, 0.0002, 0.0003)
    row = Row(4, 4, 1.2, gain, gain, gain, gain, small, 0.0, gain, ())
    assert row.pays_by_bandwidth
    assert row.pays_by_storage
    assert not replace(row, loss_gain=Range(-0.02, -0.01, -0.005)).pays_by_bandwidth
    assert not replace(row, gain=small).pays_by_bandwidth
    assert not replace(row, gain=replace(gain, low=0.0)).pays_by_storage


def test_the_sentence_names_the_widths_of_each_view() -> None:
    zero, gain, less = Range(0, 0, 0), Range(0.01, 0.02, 0.03), Range(-0.03, -0.02, -0.01)
    base = Row(2, 4, 1.2, gain, gain, gain, gain, gain, 0.0, gain, ())
    rows = (base, replace(base, bits=3), replace(base, bits=4, beyond_storage=less), replace(base, bits=8, gain=zero))
    said = advise_sentence(rows)
    assert said.startswith("Worth it at 2 and 3 bits")
    assert said.endswith("At 4 bits only where bytes read per token are the limit.")
    assert advise_sentence(rows, "too little was seen") == said
    assert advise_sentence(rows[-1:], "too little was seen").startswith("Undecided: no predicted gain")
    assert advise_sentence(rows[-1:]).startswith("Not worth it here")


def test_text_promises_as_much_as_the_generalist_adapted_with_half_of_rounding_mended() -> None:
    widths, scored = measured(0.01, 0.0)
    generalist, untrained = Scores(scored.base - 0.05, scored.base), Scores(scored.base + 0.2, scored.base)
    np.testing.assert_allclose(promise(scored, generalist, untrained), 0.15)
    np.testing.assert_array_equal(promise(scored, widths[1].generalist, None), widths[1].generalist.divergence)


def test_a_label_without_a_specialist_gains_in_proportion_to_its_promise() -> None:
    widths, scored = measured(0.01, 0.0, specialists=1)
    scored = replace(scored, by_text=True)
    for other, factor in ((0.05, 1.5), (0.1, 2.0), (-0.1, 1.0)):  # `a` has a specialist and promises 0.1
        width = replace(widths[1], promise=np.where(scored.label == "a", 0.1, other))
        row = predictor([width], scored).row(width, 3)
        assert row.gain.value == pytest.approx(factor * 0.01 / 2)  # half of the windows are of `a`
        assert row.extrapolated == ("experts",)
