import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moqe.data.classification import CLASS_METRICS, class_values, score_classes
from moqe.errors import NumericalError, ProtocolError


def test_values_by_hand() -> None:
    log_probabilities = np.log(np.array([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2], [0.25, 0.25, 0.5]]))
    values = class_values(log_probabilities, np.array([0, 2, 1]))
    assert values["top1"].tolist() == [1, 0, 0]
    assert values["top5"].tolist() == [1, 1, 1]  # three classes
    assert values["cross_entropy"] == pytest.approx([math.log(2), math.log(5), math.log(4)])


def test_of_equal_classes_the_first_is_answered() -> None:
    equal = np.zeros((7, 7))
    values = class_values(equal, np.arange(7))
    assert values["top1"].tolist() == [1, 0, 0, 0, 0, 0, 0]
    assert values["top5"].tolist() == [1, 1, 1, 1, 1, 0, 0]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(6, 30), st.integers(1, 40))
def test_agrees_with_torch(seed: int, classes: int, n: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(n, classes, generator=generator)
    label = torch.randint(classes, (n,), generator=generator)
    scored = score_classes(logits, label)
    found = scored.losses["whole"]
    assert tuple(found) == CLASS_METRICS
    assert np.array_equal(found["top1"].loss_sum, (logits.argmax(1) == label).double().numpy())
    within = (logits.topk(5).indices == label[:, None]).any(1).double().numpy()
    assert np.array_equal(found["top5"].loss_sum, within)
    expected = torch.nn.functional.cross_entropy(logits.double(), label, reduction="none").numpy()
    assert np.allclose(found["cross_entropy"].loss_sum, expected)
    for losses in found.values():
        assert losses.count.tolist() == [1] * n
        assert losses.first_half_count.tolist() == [0] * n
    assert scored.log_probabilities is not None
    assert scored.log_probabilities.dtype == np.float16
    assert np.allclose(np.exp(scored.log_probabilities.astype(np.float64)).sum(1), 1, atol=2e-3)


def test_the_improbable_stays_finite() -> None:
    scored = score_classes(torch.tensor([[0.0, 1e6]]), torch.tensor([0]))
    assert scored.losses["whole"]["cross_entropy"].loss_sum[0] == pytest.approx(1e6)
    assert scored.log_probabilities is not None
    assert np.isfinite(scored.log_probabilities).all()


def test_what_is_no_answer_is_refused() -> None:
    with pytest.raises(NumericalError, match="sample 1"):
        score_classes(torch.tensor([[0.0, 1.0], [math.nan, 0.0]]), torch.tensor([0, 1]))
    with pytest.raises(ProtocolError, match="labels run from 0 to 2 and the model has 2 classes"):
        score_classes(torch.zeros(2, 2), torch.tensor([0, 2]))
