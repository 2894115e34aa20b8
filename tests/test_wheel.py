"""The wheel: everything the package needs to run, nothing else, and small."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from moqe.bundled import CLASSIFIERS, MODELS, QUICKSTARTS

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src"
MEBIBYTE = 1 << 20


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel as `pip wheel .` builds it, without an environment of its own."""
    from hatchling.builders.wheel import WheelBuilder

    (built,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path_factory.mktemp("dist")), versions=["standard"])
    return Path(built)


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_it_holds_the_package_and_nothing_else(wheel: Path) -> None:
    metadata = wheel.name.removesuffix("-py3-none-any.whl") + ".dist-info/"
    found = {name for name in names(wheel) if not name.startswith(metadata)}
    present = {str(path.relative_to(SOURCE)) for path in (SOURCE / "moqe").rglob("*") if path.is_file()}
    assert found == {name for name in present if "__pycache__" not in name and not name.endswith(".partial")}


def test_it_holds_what_runs_without_a_network(wheel: Path) -> None:
    found = names(wheel)
    bundled = {f"{model}/{file}" for model in (*MODELS, *CLASSIFIERS) for file in ("model.safetensors", "digests.json")}
    bundled |= {f"{model}/{file}" for model in MODELS for file in ("config.json", "tokenizer.json")}
    assert {f"moqe/bundled/{name}" for name in (*bundled, *QUICKSTARTS.values())} <= found
    assert {"moqe/py.typed", "moqe/evaluate/report.html.jinja", "moqe/evaluate/card.md.jinja"} <= found


def test_it_is_small(wheel: Path) -> None:
    assert wheel.stat().st_size <= 12 * MEBIBYTE
    with zipfile.ZipFile(wheel) as archive:
        models = sum(entry.compress_size for entry in archive.infolist() if "/tiny-qwen3/" in entry.filename)
    assert models <= 8 * MEBIBYTE


def test_it_installs_the_command(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (entry,) = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
        assert archive.read(entry).decode().split() == ["[console_scripts]", "moqe", "=", "moqe.cli:main"]
