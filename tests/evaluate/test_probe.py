"""The probe: chosen on the first k tokens, scored on the rest, paid for by every expert's prefix."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moqe.data.protocols import WHOLE, reduce
from moqe.errors import ProtocolError
from moqe.evaluate import judge
from moqe.evaluate.card import render_card
from moqe.evaluate.context import ReportContext
from moqe.evaluate.domain_label import fit_domain_label
from moqe.evaluate.loss_table import LossTable
from moqe.evaluate.outcome import routed
from moqe.evaluate.probe import prefix_losses, probed
from moqe.evaluate.report import render_report
from moqe.evaluate.routing import ROUTERS, RoutingData, answer, fit_routers
from moqe.evaluate.verdict import ExpertSummary, Verdict
from moqe.progress import Silent
from moqe.recipe import Router
from moqe.router import VectorFeatures

NATS = "nats_per_token"


def table_of(losses: torch.Tensor, protocol: str, domains: list[str] | None = None) -> LossTable:
    """A table from the losses of every token, (experts, n, window - 1), by the loss table's own rule."""
    reduced = [reduce(one, protocol) for one in losses]
    n = losses.shape[1]
    loss = np.stack([one.loss_sum for one in reduced], 1)
    first = np.stack([one.first_half_sum for one in reduced], 1)
    count, half = reduced[0].count.astype(float), reduced[0].first_half_count.astype(float)
    return LossTable(
        protocol=protocol,
        runtime="reference",
        metric=NATS,
        experts=tuple(f"e{i}" for i in range(len(losses))),
        loss=loss,
        base=loss.min(1),
        halves=np.stack([first, loss - first], -1),
        count=count,
        count_halves=np.stack([half, count - half], -1),
        text_bytes=4 * count,
        sample=np.arange(n),
        document=np.asarray([f"d{i // 2}" for i in range(n)]),
        domain=np.asarray(domains or ["code", "prose"] * (n // 2)),
    )


@settings(max_examples=40, deadline=None)
@given(
    experts=st.integers(2, 4),
    window=st.integers(4, 20),
    prefix=st.integers(2, 19),
    seed=st.integers(0, 2**31),
)
def test_the_two_protocols_hold_what_a_probe_sees(experts: int, window: int, prefix: int, seed: int) -> None:
    """k tokens in hand are k - 1 predictions; the expert that is best on them is the one that answers the rest."""
    prefix = min(prefix, window - 1)
    losses = torch.rand(experts, 6, window - 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    whole, rest = table_of(losses, WHOLE), table_of(losses, f"prefix-{prefix}")
    seen = losses[:, :, : prefix - 1].sum(2).T.numpy()
    assert prefix_losses(whole, rest) == pytest.approx(seen)
    outcome = probed({NATS: rest}, whole, NATS)
    chosen = seen.argmin(1)
    assert np.array_equal(outcome.asked.argmax(1), chosen)
    assert np.array_equal(outcome.values[NATS], rest.loss[np.arange(6), chosen])
    assert outcome.mean_cost == pytest.approx((experts * prefix + window - prefix) / window)


def test_a_probe_by_hand() -> None:
    losses = torch.tensor(
        [
            [[1.0, 2.0, 5.0, 5.0, 5.0], [3.0, 2.0, 1.0, 1.0, 1.0]],  # expert 0 on two windows of 6 tokens
            [[2.0, 2.0, 1.0, 1.0, 1.0], [1.0, 1.0, 9.0, 9.0, 9.0]],
        ]
    )
    whole, rest = table_of(losses, WHOLE), table_of(losses, "prefix-3")
    assert prefix_losses(whole, rest).tolist() == [[3.0, 4.0], [5.0, 2.0]]
    outcome = probed({NATS: rest}, whole, NATS)
    assert outcome.values[NATS].tolist() == [15.0, 27.0]  # misled both times: the rest is what counts
    assert outcome.cost.tolist() == [(2 * 3 + 3) / 6] * 2
    assert outcome.share.tolist() == [0.5, 0.5]


def test_tables_that_do_not_fit_are_refused() -> None:
    losses = torch.rand(2, 4, 7)
    whole, rest = table_of(losses, WHOLE), table_of(losses, "prefix-3")
    with pytest.raises(ProtocolError, match="of other samples, experts or runtimes"):
        prefix_losses(whole.select(np.array([0, 1, 3, 2])), rest)
    with pytest.raises(ProtocolError, match="of other samples, experts or runtimes"):
        prefix_losses(replace(whole, runtime="other"), rest)
    with pytest.raises(ProtocolError, match="no token for a probe"):
        prefix_losses(whole, table_of(losses, "prefix-1"))


def test_a_domain_gets_the_expert_of_the_routers_documents(by_hand: Callable[..., LossTable]) -> None:
    train = by_hand([[20.0, 22.0], [30.0, 26.0]], [19.0, 25.0], domains=["code", "prose"])
    validation = by_hand([[20.0, 27.0], [21.0, 23.0]], [19.0, 25.0], domains=["prose", "code"])
    label = fit_domain_label([train, validation])
    assert label is not None
    assert label.expert_of == {"code": 0, "prose": 0}  # of prose 50 against 53: both tables count
    assert fit_domain_label([train]).expert_of == {"code": 0, "prose": 1}
    test = by_hand([[1.0, 2.0]] * 3, [1.0] * 3, domains=["prose", "code", "mail"])
    assert fit_domain_label([train]).choice(test).tolist() == [1, 0, 1]  # 48 against 50 nats over all
    assert fit_domain_label([train], generalist=0).choice(test).tolist() == [1, 0, 0]


def test_one_domain_or_classes_have_no_label(
    by_hand: Callable[..., LossTable], simulated_images: Callable[..., Any]
) -> None:
    assert fit_domain_label([by_hand([[20.0, 22.0]] * 4, [19.0] * 4)]) is None
    assert fit_domain_label([simulated_images(0).tables["top1"]]) is None


@pytest.fixture(scope="module")
def windows() -> Callable[[int], tuple[LossTable, LossTable, VectorFeatures]]:
    """60 documents of two windows of 24 tokens: an expert is better on its domain throughout, features are noise."""

    def make(seed: int) -> tuple[LossTable, LossTable, VectorFeatures]:
        generator = torch.Generator().manual_seed(seed)
        domain = [("code", "mail", "prose")[i // 2 % 3] for i in range(120)]
        own = torch.tensor([[name == one for one in domain] for name in ("code", "mail", "prose")])
        losses = 3.0 + 0.5 * torch.rand(3, 120, 23, generator=generator) - 0.4 * own[:, :, None]
        features = VectorFeatures(torch.randn(120, 4, generator=generator))
        return table_of(losses, WHOLE, domain), table_of(losses, "prefix-8", domain), features

    return make


@pytest.fixture(scope="module")
def fitted(windows: Callable[[int], tuple[LossTable, LossTable, VectorFeatures]]) -> Any:
    data = []
    for seed in (0, 1):
        _, rest, features = windows(seed)
        data.append(RoutingData(rest, rest, features))
    return fit_routers(data[0], data[1], Router(epochs=1), "image", 0, Silent(), fallback=0)


def test_probe_and_domain_in_the_verdict(
    windows: Callable[[int], tuple[LossTable, LossTable, VectorFeatures]], fitted: Any
) -> None:
    whole, rest, features = windows(2)
    label = fit_domain_label([windows(0)[1], windows(1)[1]])
    assert label is not None
    for policy in ("route", "probe"):
        found = answer({NATS: rest}, features, fitted.routers, whole=whole, labelled=label.choice(rest), policy=policy)
        assert set(found.outcomes) == {*ROUTERS, "route", "probe", "domain"} - {"unguarded"}
        assert found.outcomes["mixture"] is found.outcomes[policy]
        verdict = judge({NATS: rest}, windows(1)[1], found.outcomes, 0, 100, policy=policy)
        assert set(verdict.policies) == {"route", "probe"}
        assert "domain" not in verdict.routers
        assert verdict.policies["probe"].cost == pytest.approx((3 * 8 + 16) / 24)
        assert verdict.domain_label is not None
        assert verdict.domain_label.cost == 1.0
        expected = [rest.loss[i, label.expert_of[name]] for i, name in enumerate(rest.domain)]
        assert verdict.domain_label.value == pytest.approx(sum(expected) / rest.count.sum())
        kinds = {line.name: line.kind for line in verdict.lines}
        assert (kinds["probe"], kinds["route"], kinds["domain"]) == ("policy", "policy", "bound")
        names = [line.name for line in verdict.lines]
        assert names[-3:] == ["domain", "oracle", "split-half oracle"]
        assert verdict.domain_label_gap.value > 0.1
        assert verdict.domain_label_share.low is not None
    assert verdict.wins
    assert verdict.domain_label_share.value > 0.9
    assert "1.667 forward passes per sample" in verdict.sentence
    plain = answer({NATS: rest}, features, fitted.routers)
    assert set(plain.outcomes) == set(ROUTERS) - {"unguarded"}


def test_pages_say_what_a_probe_costs_and_that_a_label_cannot_be_deployed(
    windows: Callable[[int], tuple[LossTable, LossTable, VectorFeatures]], fitted: Any
) -> None:
    from io import StringIO

    from rich.console import Console

    from moqe.evaluate.terminal import verdict_renderable

    whole, rest, features = windows(2)
    label = fit_domain_label([rest])
    assert label is not None
    found = answer({NATS: rest}, features, fitted.routers, whole=whole, labelled=label.choice(rest), policy="probe")
    one = judge({NATS: rest}, rest, found.outcomes, 0, 100, policy="probe")
    experts = {name: ExpertSummary("rtn", "w4a16", 9, 0.0) for name in rest.experts}
    verdict = Verdict("0123456789abcdef", NATS, "prefix-8", {"prefix-8": one}, experts, 18, 12, 0, 100)
    context = ReportContext("somebody/model", "base: somebody/model\n", {}, {}, ())
    shown = StringIO()
    Console(file=shown, width=80).print(verdict_renderable(verdict))
    terminal = " ".join(shown.getvalue().split())
    for page in (terminal, render_card(verdict, context), render_report(verdict, context)):
        assert "1.667" in page
        assert "cannot be deployed" in page
        assert "policy is probe" in page
    assert "every expert scores the tokens" in render_report(verdict, context)
    assert "cascade" not in render_report(verdict, context)


def test_the_order_of_ties_is_the_experts() -> None:
    losses = torch.ones(3, 2, 7)
    outcome = probed({NATS: table_of(losses, "prefix-3")}, table_of(losses, WHOLE), NATS)
    assert outcome.asked.argmax(1).tolist() == [0, 0]
    assert np.array_equal(
        outcome.values[NATS], routed({NATS: table_of(losses, "prefix-3")}, np.zeros(2, np.int64)).values[NATS]
    )
