"""The certificate and the registry's checks."""

from __future__ import annotations

import dataclasses
import json

import pytest

from moqe.errors import CheckpointError, RecipeError, UnsupportedLayer
from moqe.methods import METHODS, check, method_named
from moqe.methods.certificate import Certificate, LayerRecord, certify
from moqe.recipe import Expert

EXPERT = Expert(name="x", method="gptq", scheme="w4a16", group_size=64)


def record(name: str = "a", parameters: int = 100, **changes: object) -> LayerRecord:
    base = LayerRecord(
        name, "gptq", "gptq", "w4a16", "w4a16", 64, parameters, 4.25, 512.0, 0.01, 0.02, False, "", {"damping": 0.01}
    )
    return dataclasses.replace(base, **changes)


def test_totals_are_weighted_by_parameters() -> None:
    kept = record(
        "b", 300, method_used="keep", bits_per_weight=16.0, error=None, baseline_error=None, substituted="why"
    )
    certificate = certify(EXPERT, [record(), kept], calibrated=True)
    assert certificate.parameters == 400
    assert certificate.substituted_share == 0.75
    assert certificate.bits_per_weight == pytest.approx((4.25 + 3 * 16) / 4, abs=1e-4)
    assert certificate.error == 0.01
    assert certificate.baseline_error == 0.02
    assert certificate.substitutions == (kept,)


def test_json_round_trip() -> None:
    certificate = certify(EXPERT, [record(), record("b", error=None)], calibrated=True)
    content = json.loads(json.dumps(certificate.to_json()))
    assert Certificate.from_json(content) == certificate
    assert LayerRecord.from_json(content["layers"][0]) == certificate.layers[0]


@pytest.mark.parametrize("damage", ["layers", "parameters"])
def test_a_malformed_certificate(damage: str) -> None:
    content = certify(EXPERT, [record()], calibrated=True).to_json()
    del content[damage]
    with pytest.raises(CheckpointError, match="malformed"):
        Certificate.from_json(content)
    with pytest.raises(CheckpointError, match="malformed"):
        LayerRecord.from_json({"name": "a", "colour": "red"})


def test_a_calibrated_expert_that_is_rounding_everywhere() -> None:
    with pytest.raises(UnsupportedLayer, match="plain rounding in all 2 layers"):
        certify(EXPERT, [record(equals_baseline=True), record("b", equals_baseline=True)], calibrated=True)
    certify(EXPERT, [record(equals_baseline=True), record("b")], calibrated=True)
    certify(Expert(name="x", method="rtn", scheme="w4a16"), [record(equals_baseline=True)], calibrated=False)


def test_no_layers_at_all() -> None:
    with pytest.raises(UnsupportedLayer, match="no linear layer"):
        certify(EXPERT, [], calibrated=True)


def expert(**content: object) -> Expert:
    return Expert.model_validate({"name": "x", **content})


def test_the_registry_knows_its_methods_by_their_names() -> None:
    assert all(name == method.name for name, method in METHODS.items())
    assert method_named("gptq") is METHODS["gptq"]
    with pytest.raises(RecipeError, match="did you mean 'gptq'"):
        method_named("gtpq")


def test_what_goes_together() -> None:
    wanted = check(expert(method="gptq", scheme="w3a16", group_size=32, gptq={"damping": 0.1}))
    assert (wanted.weight_bits, wanted.group_size, wanted.symmetric) == (3, 32, False)
    assert check(expert(method="awq", scheme="w4a16", symmetric=False)).symmetric is False


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"method": "gtpq", "scheme": "w4a16"}, "expert 'x': unknown method 'gtpq'; did you mean 'gptq'"),
        ({"method": "gptq", "scheme": "w4a61"}, "expert 'x': unknown scheme 'w4a61'; did you mean"),
        ({"method": "gptq", "scheme": "q4_k"}, "gptq has no scheme q4_k: write method: imatrix"),
        ({"method": "rtn", "scheme": "q4_0"}, "rtn has no scheme q4_0: write method: kquants"),
        ({"method": "smoothquant", "scheme": "w4a16"}, "smoothquant has no scheme w4a16"),
        ({"method": "awq", "scheme": "w8a8"}, "awq has no scheme w8a8"),
        ({"method": "rtn", "scheme": "w4a16", "group_size": 48}, "group_size 48 is not one of 0, 32, 64, 128"),
        ({"method": "rtn", "scheme": "w8a8", "group_size": 64}, "set group_size to 0"),
        ({"method": "rtn", "scheme": "w4a8", "symmetric": False}, "remove symmetric"),
        ({"method": "rtn", "scheme": "w4a16", "awq": {"clip": False}}, "options of awq have no effect on rtn"),
        ({"method": "rtn", "scheme": "w4a16", "calibration": {"a": 2}}, "uses no calibration data: remove calibration"),
        ({"method": "rtn", "scheme": "w4a16", "sequential": True}, "remove sequential"),
        ({"method": "rtn", "scheme": "w4a16", "block_fallback": "q4_0"}, "remove block_fallback"),
        ({"method": "kquants", "scheme": "q4_k", "block_fallback": "q6_k"}, "must be a block scheme of smaller blocks"),
        ({"method": "kquants", "scheme": "q4_k", "block_fallback": "w4a16"}, "must be a block scheme"),
        ({"method": "kquants", "scheme": "q4_k", "group_size": 32}, "fixed block layout"),
    ],
)
def test_what_does_not_go_together_says_what_to_change(content: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        check(expert(**content))
