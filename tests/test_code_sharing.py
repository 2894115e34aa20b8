"""A loaded mixture holds codes that experts share once, and runs others as before."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import moqe
from moqe.formats import open_expert
from moqe.formats.compressed_tensors_files import CompressedTensorsFiles
from moqe.formats.shared_codes import in_common
from moqe.mixture.language import LanguageMixture
from moqe.runtimes.coded_linear import CodedLinear
from moqe.runtimes.reference import ReferenceRuntime

LINEARS = 2 * 7


@pytest.fixture(scope="module")
def mixed(tiny_base: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two experts that share codes and one that shares nothing."""
    from tests.conftest import recipe_for

    first = {"name": "first", "method": "rtn", "scheme": "w4a16", "group_size": 64}
    second = {"name": "second", "codes_of": "first", "distill": {"steps": 2, "evaluate_every": 1}}
    alone = {"name": "alone", "method": "rtn", "scheme": "w3a16"}
    content = recipe_for(tiny_base, texts) | {"experts": [first, second, alone]}
    folder = tmp_path_factory.mktemp("mixed") / "m"
    moqe.build(moqe.parse_recipe(content), folder)
    return folder


def coded(mixture: Any, expert: str) -> list[CodedLinear]:
    modules = mixture.runtime(expert).model().modules()
    return [module for module in modules if isinstance(module, CodedLinear)]


def test_codes_of_two_experts_are_held_once(mixed: Path) -> None:
    mixture = moqe.load(mixed)
    assert isinstance(mixture, LanguageMixture)
    text = "def return self for in range print"
    scores = {name: mixture.score(text, expert=name).nats for name in mixture.experts}
    one, other = coded(mixture, "first"), coded(mixture, "second")
    assert len(one) == len(other) == LINEARS
    assert all(a.packed.codes is b.packed.codes for a, b in zip(one, other, strict=True))
    assert all(a.packed.scale.data_ptr() != b.packed.scale.data_ptr() for a, b in zip(one, other, strict=True))
    assert not coded(mixture, "alone")
    ids = torch.tensor([mixture.tokenizer(text)["input_ids"]])
    for name, nats in scores.items():
        plain = ReferenceRuntime(mixture._shared.model, open_expert(mixture.folder.expert(name)))
        assert float(plain.score(ids).double().sum()) == nats


def test_experts_that_were_copied_apart_share_nothing(mixed: Path, tmp_path: Path) -> None:
    shutil.copytree(mixed, tmp_path / "m")
    paths = [tmp_path / "m" / "experts" / name for name in ("first", "second")]
    files = open_expert(paths[0])
    assert isinstance(files, CompressedTensorsFiles)
    assert not in_common(files.code_files(), paths[1:])
    mixture = moqe.load(tmp_path / "m")
    assert not coded(mixture, "second")
