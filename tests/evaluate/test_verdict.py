import json
import re
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest

from moqe.errors import CheckpointError
from moqe.evaluate import ProtocolVerdict, Verdict, read_verdict, write_verdict
from moqe.evaluate.loss_table import LossTable
from moqe.evaluate.verdict import ExpertSummary

DOCUMENTATION = Path(__file__).parents[2] / "docs" / "verdict.md"
Tables = Callable[..., LossTable]
Choices = Callable[[LossTable], np.ndarray]


@pytest.fixture
def verdict(simulated: Tables, domain_choice: Choices, judged: Callable[..., ProtocolVerdict]) -> Verdict:
    protocols = {}
    for name in ("prefix-64", "whole"):
        test = simulated(0, protocol=name)
        choices = {"mixture": domain_choice(test), "constant": np.zeros(len(test), np.int64)}
        protocols[name] = judged(test, test, choices, 0, 100, predicted=test.mean)
    experts = {name: ExpertSummary("gptq", "w4a16", 2_000_000, 0.0) for name in ("awq", "gptq", "rtn")}
    return Verdict("0123456789abcdef", "nats_per_token", "prefix-64", protocols, experts, 8_000_000, 5_000_000, 0, 100)


def test_it_survives_the_disk_and_two_writes_are_equal(verdict: Verdict, tmp_path: Path) -> None:
    write_verdict(tmp_path / "a.json", verdict)
    assert read_verdict(tmp_path / "a.json") == verdict
    assert list(read_verdict(tmp_path / "a.json").experts) == list(verdict.experts)
    write_verdict(tmp_path / "b.json", read_verdict(tmp_path / "a.json"))
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_the_promised_keys_are_there(verdict: Verdict, tmp_path: Path) -> None:
    write_verdict(tmp_path / "verdict.json", verdict)
    content = json.loads((tmp_path / "verdict.json").read_text())
    assert content["recipe"] == "0123456789abcdef"
    assert content["metric"] == "nats_per_token"
    for protocol in ("whole", "prefix-64"):
        found = content["protocols"][protocol]
        for number in ("base", "oracle", "split_half_oracle", "random"):
            assert isinstance(found[number], float)
        assert all(isinstance(value, float) for value in found["experts"].values())
        assert found["best_single"] in found["experts"]
        assert {"value", "low", "high", "share"} <= found["mixture"].keys()
        assert {"value", "low", "high", "p"} <= found["difference"].keys()
        assert found["difference"]["value"] == pytest.approx(
            found["mixture"]["value"] - found["experts"][found["best_single"]]
        )


def test_the_deployed_protocol_comes_first(verdict: Verdict) -> None:
    assert [one.protocol for one in verdict.ordered] == ["prefix-64", "whole"]


def test_the_documentation_names_every_key() -> None:
    text = DOCUMENTATION.read_text()

    def keys(kind: Any) -> set[str]:
        if is_dataclass(kind):
            hints = get_type_hints(kind)
            return {one.name for one in fields(kind)} | set().union(*(keys(hint) for hint in hints.values()))
        return set().union(*(keys(inner) for inner in get_args(kind)))

    missing = {key for key in keys(Verdict) if f"`{key}`" not in text}
    assert not missing


def test_the_documented_example_follows_the_schema(tmp_path: Path) -> None:
    example = re.search(r"```json\n(.*?)```", DOCUMENTATION.read_text(), re.DOTALL)
    assert example is not None
    (tmp_path / "verdict.json").write_text(example.group(1))
    assert read_verdict(tmp_path / "verdict.json").headline.best_single == "rtn"


def test_a_file_that_is_no_verdict_is_refused(verdict: Verdict, tmp_path: Path) -> None:
    path = tmp_path / "verdict.json"
    write_verdict(path, verdict)
    content = json.loads(path.read_text())
    del content["protocols"]["whole"]["oracle"]
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"whole\.oracle"):
        read_verdict(path)
    content["protocols"]["whole"] |= {"oracle": 1.0, "wins": "yes"}
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"whole\.wins"):
        read_verdict(path)
