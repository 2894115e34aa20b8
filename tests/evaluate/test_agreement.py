"""How far a runtime is from the reference: numbers that can be worked out by hand, and a mixture's report."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import moqe
from moqe.errors import CheckpointError, DataError, MoqeError
from moqe.evaluate.agreement import Agreement, add_agreements, agreement, compare_logits, read_agreements


class Fixed:
    """A runtime that gives a table of logits, (vocabulary, vocabulary), by the token before."""

    def __init__(self, name: str, table: Tensor) -> None:
        self.name, self.table = name, table

    def logits(self, tokens: Tensor) -> Tensor:
        return self.table[tokens]

    def score(self, tokens: Tensor) -> Tensor:
        raise NotImplementedError

    def generate(self, *args: Any, **options: Any) -> list[int]:
        raise NotImplementedError


def test_a_runtime_agrees_with_itself() -> None:
    table = torch.randn(7, 7)
    found = agreement("e", Fixed("reference", table), Fixed("fast", table), torch.arange(21).view(3, 7) % 7)
    assert found == Agreement("e", "fast", 18, 0.0, 0.0, 0.0, 1.0, 1.0)


def test_every_number_by_hand() -> None:
    """Probabilities 3/4 and 1/4 against 1/2 and 1/2."""
    ours = torch.tensor([[0.75, 0.25]]).log()
    theirs = torch.tensor([[0.5, 0.5]]).log()
    table, flat = ours.expand(2, 2), theirs.expand(2, 2)
    found = agreement("e", Fixed("reference", table), Fixed("fast", flat), torch.zeros(2, 3, dtype=torch.int64))
    assert found.positions == 4
    assert found.largest == pytest.approx(math.log(2), rel=1e-6)
    assert found.mean == pytest.approx((math.log(1.5) + math.log(2)) / 2, rel=1e-6)
    assert found.divergence == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), rel=1e-6)
    assert found.perplexity_ratio == pytest.approx(1.5, rel=1e-6)  # 0 came next, with 1/2 instead of 3/4
    assert found.same_top == 1.0


def test_a_shift_of_all_logits_changes_no_distribution() -> None:
    logits = torch.randn(5, 11)
    largest, mean, divergence, same, excess = compare_logits(logits, logits + 3, torch.arange(5)).tolist()
    assert (largest, mean / 5) == pytest.approx((3, 3), rel=1e-5)
    assert (divergence, excess) == pytest.approx((0, 0), abs=1e-6)
    assert same == 5


def test_windows_are_averaged_by_their_tokens() -> None:
    table = torch.randn(9, 9)
    other = table + 0.3 * torch.randn(9, 9)
    tokens = torch.arange(36).view(4, 9) * 5 % 9
    whole = agreement("e", Fixed("reference", table), Fixed("fast", other), tokens)
    parts = [agreement("e", Fixed("reference", table), Fixed("fast", other), part) for part in tokens.split(2)]
    assert whole.divergence == pytest.approx(sum(part.divergence for part in parts) / 2)
    assert whole.largest == max(part.largest for part in parts)
    assert 0 < whole.divergence < 1


def test_without_windows_there_is_nothing_to_compare() -> None:
    with pytest.raises(DataError, match="windows to compare"):
        agreement("e", Fixed("reference", torch.eye(2)), Fixed("fast", torch.eye(2)), torch.empty(0, 4))


def test_rows_of_a_runtime_are_replaced(tmp_path: Path) -> None:
    path = tmp_path / "agreement.json"
    assert read_agreements(path) == []
    first, second = Agreement("a", "x", 1, 1, 1, 1, 1, 1), Agreement("a", "y", 1, 1, 1, 1, 1, 1)
    add_agreements(path, [first])
    add_agreements(path, [second])
    newer = Agreement("a", "x", 2, 0, 0, 0, 1, 1)
    add_agreements(path, [newer])
    assert read_agreements(path) == [newer, second]
    path.write_text('[{"expert": 1}]')
    with pytest.raises(CheckpointError, match="damaged"):
        read_agreements(path)


@pytest.fixture
def copy(built: Path, tmp_path: Path) -> Path:
    """A mixture that may be changed."""
    return Path(shutil.copytree(built, tmp_path / "m"))


def test_the_report_has_what_was_measured(copy: Path) -> None:
    moqe.evaluate(copy)  # links became files, which counts in bytes
    assert "Other runtimes beside the reference" not in (copy / "report.html").read_text()
    verdict = (copy / "verdict.json").read_text()
    moqe.evaluate(copy, runtime="llama.cpp")
    assert (copy / "verdict.json").read_text() == verdict
    found = read_agreements(copy / "agreement.json")
    assert [one.expert for one in found] == list(moqe.load(copy).experts)
    for one in found:
        assert one.runtime == "llama.cpp"
        assert one.positions == 36 * 47  # all windows of 48 tokens
        assert 0 < one.divergence < 0.01
        assert one.perplexity_ratio == pytest.approx(1, abs=0.02)
        assert one.same_top > 0.9
    report = (copy / "report.html").read_text()
    assert "Other runtimes beside the reference" in report
    assert f"{found[0].perplexity_ratio:.4f}" in report


def test_what_cannot_be_compared(copy: Path) -> None:
    with pytest.raises(MoqeError, match="is what others are compared with"):
        moqe.evaluate(copy, runtime="reference")
    with pytest.raises(MoqeError, match=r"no runtime 'lama\.cpp'.*'llama\.cpp'"):
        moqe.evaluate(copy, runtime="lama.cpp")
    assert not (copy / "agreement.json").exists()
