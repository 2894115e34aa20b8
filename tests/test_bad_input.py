"""Bad input: one clear line that names the input and the way out, exit code 2, and nothing half-written left behind."""

from __future__ import annotations

import errno
import importlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import moqe
from moqe import cli, store
from moqe.errors import CheckpointError, DataError, DiskFull, ModelError, MoqeError, NumericalError, RecipeError
from moqe.router import save_router
from moqe.router.baselines import Uniform

Content = dict[str, Any]
Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command line in this process; returns exit code and standard error on one line."""

    def call(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["moqe", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "1000")
        with pytest.raises(SystemExit) as left:
            cli.main()
        return int(left.value.code or 0), " ".join(capsys.readouterr().err.split())

    return call


def write_recipe(content: Content, folder: Path) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def one_expert(content: Content, **options: Any) -> Content:
    content["experts"] = [{"name": "e", "method": "gptq", "scheme": "w4a16", "group_size": 64} | options]
    return content


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(calibratoin=1), "unknown key 'calibratoin'"),
        (lambda c: c["data"].update(windw=64), "unknown key 'data.windw'; did you mean 'window'?"),
        (lambda c: one_expert(c, method="gtpq"), "unknown method 'gtpq'; did you mean 'gptq'?"),
        (lambda c: one_expert(c, scheme="w4a61"), "unknown scheme 'w4a61'; did you mean"),
        (lambda c: one_expert(c, scheme="q4_k", group_size=None), "gptq has no scheme q4_k"),
        (lambda c: one_expert(c, method="smoothquant", scheme="w4a16"), "smoothquant has no scheme w4a16"),
        (lambda c: one_expert(c, group_size=48), "group_size 48 is not one of"),
        (lambda c: one_expert(c, awq={"clip": False}), "options of awq have no effect on gptq"),
        (lambda c: one_expert(c, name="oracle"), "expert name 'oracle' is reserved"),
        (lambda c: one_expert(c, name="../up"), "experts.0.name"),
        (lambda c: one_expert(c, gptq={"damping": float("inf")}), "experts.0.gptq.damping"),
        (lambda c: one_expert(c, checkpoint="somewhere"), "needs either method and scheme, or checkpoint"),
        (lambda c: c.update(experts=[{"name": "e", "checkpoint": "x", "scheme": "w4a16"}]), "remove scheme"),
        (lambda c: one_expert(c, calibration={"cod": 2.0}), "unknown domain 'cod'; did you mean 'code'?"),
        (lambda c: c["protocol"].update(prefix=48), "must be shorter than data.window"),
        (lambda c: c.update(base="bundled:tiny-qwen33"), "did you mean 'tiny-qwen3'?"),
        (lambda c: c.update(base="no/such/folder/at/all"), "no/such/folder/at/all"),
        (lambda c: c["data"].update(test="/nowhere.jsonl"), "data.test"),
        (lambda c: c["data"]["test"].append({"path": "/nowhere.jsonl"}), "/nowhere.jsonl does not exist"),
        (lambda c: c["data"].update(window=4096), "one window needs"),
    ],
)
def test_recipes_that_cannot_be_built(
    change: Callable[[Content], Any], message: str, recipe_content: Content, tmp_path: Path, run: Run
) -> None:
    change(recipe_content)
    code, said = run("build", write_recipe(recipe_content, tmp_path), "--out", tmp_path / "m")
    assert code == 2
    assert message in said
    assert "Traceback" not in said
    assert not (tmp_path / "m").exists()


def test_not_yaml_and_not_there(tmp_path: Path, run: Run) -> None:
    (tmp_path / "broken.yaml").write_text("base: [")
    code, said = run("build", tmp_path / "broken.yaml")
    assert (code, "is not YAML" in said) == (2, True)
    code, said = run("build", tmp_path / "absent.yaml")
    assert (code, "absent.yaml does not exist" in said) == (2, True)


def test_empty_and_too_short_data(recipe_content: Content, tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    short = tmp_path / "short.jsonl"
    short.write_text("".join(json.dumps({"text": f"the river {i}"}) + "\n" for i in range(4)))
    for path, message in ((empty, r"empty\.jsonl holds no text"), (short, "one window needs")):
        content = json.loads(json.dumps(recipe_content))
        content["data"]["router"] = [{"path": str(path), "domain": "x"}]
        with pytest.raises(DataError, match=message):
            moqe.build(moqe.parse_recipe(content), tmp_path / path.stem)


def test_a_document_in_two_splits(recipe_content: Content, tmp_path: Path) -> None:
    recipe_content["data"]["test"].append(recipe_content["data"]["router"][0])
    with pytest.raises(DataError, match=r"code-router\.jsonl"):
        moqe.build(moqe.parse_recipe(recipe_content), tmp_path / "m")


def test_a_checkpoint_with_another_tokenizer(recipe_content: Content, tiny_base: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_base, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    recipe_content["experts"] = [{"name": "theirs", "checkpoint": str(other)}]
    with pytest.raises(CheckpointError, match="tokenizer"):
        moqe.build(moqe.parse_recipe(recipe_content), tmp_path / "m")


def test_an_already_quantized_base(recipe_content: Content, built: Path, tmp_path: Path) -> None:
    recipe_content["base"] = str(built / "experts" / "gptq")
    with pytest.raises(ModelError, match="already quantized"):
        moqe.build(moqe.parse_recipe(recipe_content), tmp_path / "m")


def damaged_base(tiny_base: Path, folder: Path, name: str, value: float) -> str:
    shutil.copytree(tiny_base, folder)
    weights = load_file(folder / "model.safetensors")
    weights[name].view(-1)[:64] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def test_weights_that_are_not_finite(recipe_content: Content, tiny_base: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    recipe_content["base"] = damaged_base(tiny_base, tmp_path / "base", name, float("nan"))
    with pytest.raises(NumericalError, match=name):
        moqe.build(moqe.parse_recipe(recipe_content), tmp_path / "m")


def test_activations_that_overflow(recipe_content: Content, tiny_base: Path, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    recipe_content["base"] = damaged_base(tiny_base, tmp_path / "base", name, 3e38)
    with pytest.raises(NumericalError, match=r"activations after model\.layers\.0 are not finite"):
        moqe.build(moqe.parse_recipe(recipe_content), tmp_path / "m")


@pytest.mark.parametrize("name", ["gptq", "kq"])
@pytest.mark.parametrize("how", ["truncated", "flipped", "missing"])
def test_a_damaged_expert_is_never_run(name: str, how: str, built: Path, tmp_path: Path, run: Run) -> None:
    folder = tmp_path / "m"
    shutil.copytree(built, folder)
    owned = [
        path for path in (folder / "experts" / name).glob("model-*") if not (folder / "shared" / path.name).exists()
    ]
    victim = sorted(owned)[-1]
    content = bytearray(victim.read_bytes())
    if how == "truncated":
        victim.write_bytes(content[: len(content) // 2])
    elif how == "flipped":
        content[-100] ^= 1
        victim.write_bytes(content)
    else:
        victim.unlink()
    code, said = run("generate", folder, "the river", "--expert", name)
    assert code == 2
    assert victim.name in said


def test_damage_in_what_experts_share_is_noticed(built: Path, tmp_path: Path, run: Run) -> None:
    folder = tmp_path / "m"
    shutil.copytree(built, folder)
    victim = folder / "shared" / "model-shared.safetensors"
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1
    victim.write_bytes(content)
    for arguments in (("route", folder, "the river"), ("inspect", folder, "--verify"), ("evaluate", folder)):
        code, said = run(*arguments)
        assert (code, "model-shared.safetensors is damaged" in said) == (2, True), said


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_damage_is_told_before_what_it_led_to(name: str, built: Path, tmp_path: Path, run: Run) -> None:
    folder = tmp_path / "m"
    shutil.copytree(built, folder)
    (folder / "shared" / name).write_text("{")
    code, said = run("route", folder, "the river")
    assert (code, f"{name} is damaged" in said) == (2, True), said


def damaged(path: Path, key: str, value: object) -> None:
    """Replace a value of a JSON file, named as `a.b`, or the whole content where the key is empty; None removes it."""
    content = json.loads(path.read_text())
    *outer, last = key.split(".")
    place = content
    for name in outer:
        place = place[name]
    if value is None:
        del place[last]
    elif last:
        place[last] = value
    path.write_text(json.dumps(content if last else value))


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("mixture.json", "", []),
        ("mixture.json", "format_version", None),
        ("mixture.json", "recipe", None),
        ("mixture.json", "identity", None),
        ("mixture.json", "identity", []),
        ("mixture.json", "shared", None),
        ("mixture.json", "protocols", []),
        ("mixture.json", "protocols", [1]),
        ("mixture.json", "experts", {}),
        ("mixture.json", "experts.gptq", []),
        ("mixture.json", "experts.gptq.files", None),
        ("mixture.json", "experts.gptq.files", {"config.json": 1}),
        ("router/prefix-16/mixture/router.json", "", []),
        ("router/prefix-16/mixture/router.json", "kind", None),
        ("router/prefix-16/mixture/router.json", "tensors", None),
        ("router/prefix-16/mixture/router.json", "kind", ["constant"]),
        ("router/prefix-16/mixture/router.json", "guard", [1]),
    ],
)
def test_damaged_files_of_a_mixture_are_named(
    file: str, key: str, value: object, built: Path, tmp_path: Path, run: Run
) -> None:
    folder = tmp_path / "m"
    shutil.copytree(built, folder)
    damaged(folder / file, key, value)
    verbs = [("route", folder, "the river")]
    verbs += [("inspect", folder), ("generate", folder, "the river")] if file == "mixture.json" else []
    for arguments in verbs:
        code, said = run(*arguments)
        assert (code, Path(file).name in said, "build" in said) == (2, True, True), said


def test_a_router_of_another_mixture(built: Path, tmp_path: Path, run: Run) -> None:
    folder = tmp_path / "m"
    shutil.copytree(built, folder)
    save_router(Uniform(2), folder / "router" / "prefix-16" / "mixture")
    code, said = run("route", folder, "the river")
    assert (code, "routes among 2 experts, and the mixture has 4" in said) == (2, True), said


@pytest.mark.parametrize(
    ("file", "key", "value", "verb"),
    [
        ("router/whole/selection.json", "", {}, "evaluate"),
        ("router/whole/selection.json", "tuned.candidates", [{"name": "linear"}], "evaluate"),
        ("verdict.json", "", {}, "inspect"),
        ("verdict.json", "protocols", [], "inspect"),
        ("experts/gptq/certificate.json", "", [], "inspect"),
    ],
)
def test_damaged_records_of_a_mixture_are_named(
    file: str, key: str, value: object, verb: str, built: Path, tmp_path: Path, run: Run
) -> None:
    folder = tmp_path / "m"
    shutil.copytree(built, folder)
    damaged(folder / file, key, value)
    code, said = run(verb, folder)
    assert (code, Path(file).name in said) == (2, True), said


def test_a_recipe_that_changed_under_a_half_built_folder(
    recipe_content: Content, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = MoqeError("stopped for the test")

    def stop(*_: object) -> None:
        raise stopped

    with monkeypatch.context() as patch:
        patch.setattr(importlib.import_module("moqe.build"), "train_routers", stop)
        with pytest.raises(MoqeError, match="stopped"):
            moqe.build(moqe.parse_recipe(recipe_content), tmp_path / "m")
    recipe_content["experts"].pop()
    code, said = run("build", write_recipe(recipe_content, tmp_path), "--out", tmp_path / "m")
    assert code == 2
    assert "another recipe" in said
    assert "changed: experts" in said


def test_data_that_changed_under_a_half_built_folder(
    recipe_content: Content, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "own.jsonl"
    shutil.copy(recipe_content["data"]["router"][0]["path"], own)
    recipe_content["data"]["router"][0]["path"] = str(own)

    def stop(*_: object) -> None:
        raise MoqeError("stopped for the test")

    with monkeypatch.context() as patch:
        patch.setattr(importlib.import_module("moqe.build"), "train_routers", stop)
        with pytest.raises(MoqeError, match="stopped"):
            moqe.build(moqe.parse_recipe(recipe_content), tmp_path / "m")
    own.write_text("\n".join(own.read_text().splitlines()[1:]))
    with pytest.raises(RecipeError, match=r"samples\.router_train"):
        moqe.build(moqe.parse_recipe(recipe_content), tmp_path / "m")


def test_another_number_of_threads_does_not_finish_a_half_built_folder(
    recipe_content: Content, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise MoqeError("stopped for the test")

    with monkeypatch.context() as patch:
        patch.setattr(importlib.import_module("moqe.build"), "score", stop)
        with pytest.raises(MoqeError, match="stopped"):
            moqe.build(moqe.parse_recipe(recipe_content), tmp_path / "m")
    torch.set_num_threads(2)
    code, said = run("build", write_recipe(recipe_content, tmp_path), "--out", tmp_path / "m")
    assert code == 2
    assert "torch threads (OMP_NUM_THREADS): 1 then, 2 now" in said
    torch.set_num_threads(1)
    with monkeypatch.context() as patch:
        patch.setattr(importlib.import_module("moqe.build"), "score", stop)
        with pytest.raises(MoqeError, match="stopped"):  # goes on as far as it got before
            moqe.build(moqe.parse_recipe(recipe_content), tmp_path / "m")


def test_a_disk_that_is_too_small(recipe_content: Content, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(store.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(DiskFull, match="free some space"):
        moqe.build(moqe.parse_recipe(recipe_content), tmp_path / "m")
    assert not (tmp_path / "m" / "shared").exists()  # noticed before anything is made


def test_a_disk_that_fills_up_leaves_nothing_behind(tmp_path: Path) -> None:
    def fill() -> None:
        with store.atomic(tmp_path / "file") as partial:
            partial.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(DiskFull, match="file"):
        fill()
    assert list(tmp_path.iterdir()) == []


def test_unknown_expert_protocol_and_empty_text(built: Path, run: Run) -> None:
    for arguments, message in (
        (("generate", built, "the", "--expert", "gtpq"), "did you mean 'gptq'?"),
        (("route", built, "the", "--protocol", "prefix-17"), "did you mean 'prefix-16'?"),
        (("route", built, ""), "the text is empty"),
        (("inspect", built.parent / "nothing"), "holds no mixture"),
    ):
        code, said = run(*arguments)
        assert (code, message in said) == (2, True), said


def test_torch_is_not_asked_for_a_device_it_lacks(built: Path, run: Run) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has the device the test needs to be absent")
    for verb in ("route", "generate"):
        code, said = run(verb, built, "the river", "--device", "cuda")
        assert code == 2
        assert "cuda" in said
