import math

import numpy as np
import pytest

from moqe.evaluate.metrics import METRICS, bits_per_byte, perplexity


def test_perplexity_of_a_uniform_guess_is_the_number_of_choices() -> None:
    assert perplexity(10 * math.log(50.0), 10) == pytest.approx(50.0)


def test_bits_per_byte_of_one_bit_a_byte() -> None:
    assert bits_per_byte(8 * math.log(2.0), 8) == pytest.approx(1.0)


def test_better_follows_the_metric() -> None:
    values = np.array([[0.2, 0.7], [0.9, 0.1]])
    assert METRICS["nats_per_token"].best(values, 1).tolist() == [0, 1]
    assert METRICS["top1"].best(values, 1).tolist() == [1, 0]
    assert METRICS["nats_per_token"].gain(np.array([2.0]), np.array([1.5]))[0] == 0.5
    assert METRICS["top1"].gain(np.array([0.5]), np.array([0.75]))[0] == 0.25


def test_costs_are_to_be_made_small() -> None:
    values = np.array([0.0, 1.0, 0.75])
    assert METRICS["cross_entropy"].cost(values).tolist() == values.tolist()
    assert METRICS["top1"].cost(values).tolist() == [1.0, 0.0, 0.25]
    assert METRICS["top1"].value_of_cost(0.25) == 0.75
    assert METRICS["cross_entropy"].value_of_cost(0.25) == 0.25


def test_every_metric_is_known_by_its_name() -> None:
    assert all(metric.name == name for name, metric in METRICS.items())
    assert {name for name, metric in METRICS.items() if metric.binary} == {"top1", "top5"}
    assert {name for name, metric in METRICS.items() if metric.is_nats} == {"nats_per_token"}
