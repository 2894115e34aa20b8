import pytest

from moqe.evaluate import format as write
from moqe.evaluate.metrics import METRICS
from moqe.evaluate.significance import Interval


@pytest.mark.parametrize(
    ("value", "written"),
    [(0.0, "0.0000"), (-0.0, "0.0000"), (0.01234, "+0.0123"), (-0.5, f"{write.MINUS}0.5000"), (-0.00001, "0.0000")],
)
def test_differences_carry_a_sign_unless_they_are_nothing(value: float, written: str) -> None:
    assert write.signed(value) == written


def test_intervals() -> None:
    assert write.signed_interval(Interval(-0.5, -0.75, -0.25, 0.01, 9, 9), 2) == "-0.50 [-0.75, -0.25]".replace(
        "-", write.MINUS
    )
    assert write.signed_interval(Interval(-0.5, None, None, 1.0, 1, 9), 2) == f"{write.MINUS}0.50 {write.NONE}"
    assert write.share_interval(Interval(0.5, 0.25, 0.75, None, 9, 9)) == "50 % [25 %, 75 %]"
    assert write.share_interval(None) == write.NONE
    assert write.bounds(1.0, 2.0, 1) == "[1.0, 2.0]"


@pytest.mark.parametrize(("p", "written"), [(None, write.NONE), (0.00004, "< 0.0001"), (0.0123, "0.012"), (1.0, "1")])
def test_p_values(p: float | None, written: str) -> None:
    assert write.p_value(p) == written


def test_p_in_a_sentence() -> None:
    assert write.p_statement(0.00001) == "p < 0.0001"
    assert write.p_statement(0.04) == "p = 0.04"


@pytest.mark.parametrize(
    ("count", "written"), [(512, "512 B"), (2048, "2.0 KiB"), (5 * 2**20, "5.0 MiB"), (3 * 2**30, "3.00 GiB")]
)
def test_sizes(count: int, written: str) -> None:
    assert write.size(count) == written


def test_accuracies_are_per_cent_and_their_differences_points() -> None:
    top1 = METRICS["top1"]
    found = Interval(0.0046, 0.0021, 0.00704, 0.01, 9, 9)
    assert write.metric_value(0.9338, top1) == "93.38"
    assert write.metric_value(None, top1) == write.NONE
    assert write.metric_bounds(0.92, 0.9456, top1) == "[92.00, 94.56]"
    assert write.metric_bounds(None, None, top1) == write.NONE
    assert write.metric_difference(-0.0046, top1) == f"{write.MINUS}0.46"
    assert write.metric_difference(0.00001, top1) == "0.00"
    assert write.metric_interval(found, top1) == "+0.46 [+0.21, +0.70]"
    assert write.metric_difference_bounds(Interval(0.1, None, None, None, 1, 1), top1) == write.NONE


@pytest.mark.parametrize("name", ["nats_per_token", "cross_entropy"])
def test_nats_are_written_as_they_are(name: str) -> None:
    assert write.metric_value(2.34567, METRICS[name]) == "2.3457"
    assert write.metric_interval(Interval(-0.5, -0.75, -0.25, 0.01, 9, 9), METRICS[name]) == write.signed_interval(
        Interval(-0.5, -0.75, -0.25, 0.01, 9, 9)
    )


@pytest.mark.parametrize(
    ("passes", "written"), [(1.0, "1"), (4.0, "4"), (1.0578, "1.058"), (1.0001, "1.000"), (2.252, "2.25")]
)
def test_costs(passes: float, written: str) -> None:
    assert write.cost(passes) == written
