import pytest

from moqe.evaluate import format as write
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
