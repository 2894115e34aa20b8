"""Experts as plain files for other programs: weights as they were, nothing linked, nothing left half done."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import moqe
from moqe.errors import CheckpointError, FolderBusy, MoqeError
from moqe.export import MANIFEST, _Job, export
from moqe.folder import MixtureFolder
from moqe.formats import open_expert
from moqe.formats.gguf_files import GgufFiles
from moqe.progress import Silent
from moqe.runtimes.llamacpp import LlamaCppRuntime
from moqe.store import digest_file


def floats(value: Any) -> Tensor:
    return value.float() if isinstance(value, Tensor) else value.dequantize()


@pytest.fixture(scope="module")
def files(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All experts of the mixture as GGUF."""
    folder = tmp_path_factory.mktemp("export") / "files"
    done = export(built, "gguf", folder)
    assert (done.folder, done.to, set(done.experts)) == (folder, "gguf", {"gptq", "rtn", "smooth", "kq"})
    return folder


@pytest.mark.parametrize("name", ["gptq", "rtn", "smooth", "kq"])
def test_gguf_holds_the_experts_weights(name: str, built: Path, files: Path) -> None:
    expert, written = open_expert(built / "experts" / name), GgufFiles(files / f"{name}.gguf")
    assert set(written.names()) >= set(expert.names())
    for parameter in expert.names():
        torch.testing.assert_close(
            floats(written.load(parameter)), floats(expert.load(parameter)), rtol=0, atol=0, msg=parameter
        )


def test_a_mixture_runs_in_llama_cpp(built: Path, files: Path) -> None:
    mixture = moqe.load(built)
    tokens = mixture.tokenizer("the old river walked slowly into one green morning plus two houses")["input_ids"]
    window = torch.tensor([tokens[:24]])
    for name in mixture.experts:
        runtime = LlamaCppRuntime(files / f"{name}.gguf", threads=1, context_tokens=64)
        reference = mixture.runtime(name).score(window)
        assert float(runtime.score(window).mean() - reference.mean()) == pytest.approx(0, abs=0.02)
        runtime.release()


def test_the_manifest_says_what_is_there(files: Path) -> None:
    manifest = json.loads((files / MANIFEST).read_text())
    assert manifest["format"] == "gguf"
    assert all(entry["lossless"] for entry in manifest["experts"].values())
    assert manifest["experts"]["rtn"]["types"] == {"BF16": 1, "F32": 9, "Q4_0": 14}
    assert manifest["experts"]["smooth"]["types"]["Q8_0"] == 14
    assert set(manifest["files"]) == {path.name for path in files.iterdir()} - {MANIFEST}
    for name, digest in manifest["files"].items():
        assert digest_file(files / name) == digest
    assert (files / "gptq.Modelfile").read_text() == "FROM ./gptq.gguf\n"


def test_the_same_mixture_gives_the_same_bytes(built: Path, files: Path, tmp_path: Path) -> None:
    export(built, "gguf", tmp_path / "again", experts=["gptq"])
    assert (tmp_path / "again" / "gptq.gguf").read_bytes() == (files / "gptq.gguf").read_bytes()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["gptq", "smooth"])
def test_folders_load_in_transformers(name: str, built: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "folders"
    export(built, "compressed-tensors", out, experts=[name])
    assert all(path.stat().st_nlink == 1 for path in out.rglob("*") if path.is_file())
    mixture = moqe.load(built)
    model = AutoModelForCausalLM.from_pretrained(out / name, dtype=torch.float32).eval()
    tokens = torch.tensor([AutoTokenizer.from_pretrained(out / name)("the old river")["input_ids"]])
    with torch.no_grad():
        logits = model(tokens).logits
    torch.testing.assert_close(logits, mixture.runtime(name).logits(tokens), atol=2e-2, rtol=0)


def test_a_gguf_expert_has_no_folder(built: Path, tmp_path: Path) -> None:
    with pytest.raises(MoqeError, match=r"kq is stored as gguf.*--expert gptq --expert rtn --expert smooth"):
        export(built, "compressed-tensors", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_texts_have_no_onnx_files(built: Path) -> None:
    with pytest.raises(MoqeError, match="choose gguf or compressed-tensors"):
        export(built, "onnx")


def test_images_are_copied_with_their_description(tmp_path: Path) -> None:
    """Only the files that are copied: a mixture of images is built elsewhere."""
    from moqe.export import EXPORTERS

    place = MixtureFolder(tmp_path / "m")
    place.expert("qat").mkdir(parents=True)
    place.shared.mkdir()
    (place.expert("qat") / "model.onnx").write_bytes(b"network")
    (place.shared / "images.json").write_text("{}")
    out = tmp_path / "out"
    out.mkdir()
    task, write = EXPORTERS["onnx"]
    assert task == "image-classification"
    assert write(_Job(place, out, False, Silent()), "qat") == {"file": "qat.onnx"}
    assert (out / "qat.onnx").read_bytes() == b"network"
    assert (out / "images.json").exists()


def test_names_that_are_unknown(built: Path, tmp_path: Path) -> None:
    with pytest.raises(MoqeError, match="did you mean 'gguf'"):
        export(built, "ggf")
    with pytest.raises(MoqeError, match=r"no expert 'gptk'.*did you mean 'gptq'"):
        export(built, "gguf", tmp_path / "out", experts=["gptk"])


def test_a_folder_that_holds_files_is_left_alone(built: Path, tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(FolderBusy, match="choose a new or empty folder"):
        export(built, "gguf", tmp_path)
    assert (tmp_path / "note.txt").read_text() == "mine"


def test_a_scale_that_float16_lacks(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused by the tensor's name, and nothing is left; rounded when asked to, and then said."""
    from moqe.formats import compressed_tensors_files

    original = compressed_tensors_files.CompressedTensorsFiles.load

    def load(self: Any, name: str) -> Any:
        value = original(self, name)
        if name.endswith("layers.1.mlp.up_proj.weight"):
            value.scale[0, 0] = 1.1e-6
        return value

    monkeypatch.setattr(compressed_tensors_files.CompressedTensorsFiles, "load", load)
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight has no lossless form.*allow rounding"):
        export(built, "gguf", tmp_path / "out", experts=["gptq"])
    assert not (tmp_path / "out").exists()
    done = export(built, "gguf", tmp_path / "out", experts=["gptq"], rounding=True)
    assert not done.experts["gptq"]["lossless"]
    ((name, found),) = done.experts["gptq"]["rounded"].items()
    assert name.endswith("layers.1.mlp.up_proj.weight")
    assert found["scales"] == 2  # the two blocks of the group
    assert 0 < found["largest_error"] < 1e-3
