import numpy as np
import pytest
import torch

from moqe.data.protocols import describe_text, first_unit, protocol_digest, reduce, scored_bytes, visible_tokens
from moqe.data.samples import TextSamples
from moqe.errors import NumericalError, ProtocolError


def test_whole_scores_every_predicted_token_and_prefix_the_tokens_after_it() -> None:
    nats = torch.tensor([[1.0, 2.0, 4.0, 8.0, 16.0]])  # predictions of the tokens at positions 1 to 5
    whole, prefix = reduce(nats, "whole"), reduce(nats, "prefix-3")
    assert (whole.loss_sum[0], whole.count[0], whole.first_half_sum[0], whole.first_half_count[0]) == (31.0, 5, 3.0, 2)
    # positions 3, 4 and 5 are not in the prefix of 3 tokens
    assert (prefix.loss_sum[0], prefix.count[0], prefix.first_half_sum[0], prefix.first_half_count[0]) == (28, 3, 4, 1)


def test_prefix_of_one_token_is_scored_like_the_whole() -> None:
    nats = torch.rand(3, 7)
    assert np.array_equal(reduce(nats, "whole").loss_sum, reduce(nats, "prefix-1").loss_sum)


def test_a_single_unit_has_an_empty_first_half() -> None:
    losses = reduce(torch.tensor([[0.5]]), "whole")
    assert losses.count[0] == 1
    assert losses.first_half_count[0] == 0


def test_sums_run_in_float64() -> None:
    nats = torch.full((1, 4096), 0.1, dtype=torch.float32)
    assert reduce(nats, "whole").loss_sum[0] == pytest.approx(4096 * float(torch.tensor(0.1)), rel=1e-12)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_refused_even_where_it_is_not_scored(bad: float) -> None:
    nats = torch.ones(2, 8)
    nats[1, 0] = bad
    with pytest.raises(NumericalError, match="sample 1"):
        reduce(nats, "prefix-4")


@pytest.mark.parametrize("name", ["prefix", "prefix-0", "prefix-x", "Whole", "prefix-64 "])
def test_unknown_protocols_are_refused(name: str) -> None:
    with pytest.raises(ProtocolError, match="unknown protocol"):
        first_unit(name)


def test_a_prefix_that_covers_the_window_is_refused() -> None:
    with pytest.raises(ProtocolError, match="nothing to score"):
        reduce(torch.ones(1, 7), "prefix-8")


def test_what_the_router_sees() -> None:
    assert visible_tokens("whole") is None
    assert visible_tokens("prefix-64") == 64


def test_digests_differ_by_rule_and_length() -> None:
    digests = {protocol_digest(name, units) for name in ("whole", "prefix-4", "prefix-5") for units in (15, 31)}
    assert len(digests) == 6


def test_scored_bytes_leave_out_what_comes_before_the_first_scored_token() -> None:
    words = ["", "a", "bé", "ccc"]  # id 0 is a special token: it decodes to nothing
    samples = TextSamples(torch.tensor([[0, 1, 2, 3], [3, 3, 2, 1]]), ("d", "e"), ("x", "y"), (7, 10))

    def decode(ids: list[int]) -> str:
        return "".join(words[i] for i in ids)

    assert scored_bytes(samples, "whole", decode).tolist() == [7, 7]
    assert scored_bytes(samples, "prefix-3", decode).tolist() == [3, 1]
    described = describe_text(samples, ("whole", "prefix-3"), decode)
    assert described.digest == samples.digest
    assert described.protocol_digests["prefix-3"] == protocol_digest("prefix-3", 3)
