"""The command line: every verb, as text and as JSON."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

import moqe
from moqe import cli, verbs
from moqe.errors import MoqeError, RecipeError

Run = Callable[..., str]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command line in this process; returns standard output."""

    def call(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["moqe", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "120")
        cli.main()
        return capsys.readouterr().out

    return call


def test_help_names_every_verb(run: Run) -> None:
    said = run("--help")
    for verb in ("quickstart", "build", "evaluate", "route", "generate", "inspect", "export", "doctor"):
        assert verb in said


@pytest.mark.parametrize("words", [("build",), ("build", "a", "b"), ("bild",), ("build", "a", "--sed", "b")])
def test_wrong_use_is_explained_without_a_traceback(
    words: tuple[str, ...], run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(*words)
    assert stopped.value.code == 2
    assert "Error: " in capsys.readouterr().err


def test_every_verb_is_a_public_function_with_the_same_options() -> None:
    group: Any = typer.main.get_command(cli.app)
    of_the_command_line = {"build": {"dry_run"}}  # `moqe.plan`
    for verb, command in group.commands.items():
        function = getattr(moqe, verb)
        assert verb in moqe.__all__
        assert inspect.isfunction(function), verb
        offered = {parameter.name for parameter in command.params} - {"as_json"} - of_the_command_line.get(verb, set())
        assert offered == set(inspect.signature(function).parameters) - {"progress"}, verb


def test_the_functions_do_what_an_opened_mixture_does(built: Path) -> None:
    mixture = moqe.load(built)
    assert moqe.route(built, "the old river", protocol="whole") == mixture.route("the old river", protocol="whole")
    drawn = {"expert": "rtn", "max_new_tokens": 5, "temperature": 9.0, "seed": 3}
    assert moqe.generate(built, "one two", **drawn) == mixture.generate("one two", **drawn)  # type: ignore[arg-type]
    with pytest.raises(MoqeError, match="it has no classify"):
        moqe.classify(built, "river.png")


def test_quickstart_builds_the_bundled_recipe_of_a_task(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(verbs, "build", lambda recipe, folder, **options: asked.append((recipe, folder, options)))
    moqe.quickstart(tmp_path, device="cpu")
    assert asked == [(moqe.quickstart_recipe("language"), tmp_path, {"device": "cpu", "progress": None})]
    with pytest.raises(RecipeError, match="did you mean 'language'"):
        moqe.quickstart(tmp_path, task="langauge")


def test_version(run: Run) -> None:
    assert run("--version").startswith("moqe ")


def test_build_prints_the_verdict_of_a_finished_folder(
    built: Path, recipe_content: dict[str, Any], tmp_path: Path, run: Run
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(recipe_content))
    said = run("build", recipe, "--out", built)
    assert "best single" in said.lower() or "the mixture" in said.lower()
    assert "report.html" in said
    found = json.loads(run("build", recipe, "--out", built, "--json"))
    assert found["verdict"]["recipe"] == found["recipe"]


def test_dry_run_needs_no_weights_and_writes_nothing(
    tiny_base: Path, recipe_content: dict[str, Any], tmp_path: Path, run: Run
) -> None:
    config_only = tmp_path / "base"
    config_only.mkdir()
    (config_only / "config.json").write_text((tiny_base / "config.json").read_text())
    recipe_content["base"] = str(config_only)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(recipe_content))
    found = json.loads(run("build", recipe, "--out", tmp_path / "m", "--dry-run", "--json"))
    assert found["ram_bytes"] > 0
    assert found["disk_bytes"] > 0
    assert {"calibrate_seconds", "quantize_seconds", "score_seconds"} <= set(found)
    assert "ram" in run("build", recipe, "--dry-run")
    assert not (tmp_path / "m").exists()


def test_route_and_generate(built: Path, run: Run) -> None:
    decision = json.loads(run("route", built, "the old river", "--json"))
    assert decision["expert"] in decision["costs"]
    assert decision["expert"] in run("route", built, "the old river", "--device", "cpu")
    answer = json.loads(run("generate", built, "one two", "--expert", "kq", "--max-new-tokens", 3, "--json"))
    assert (answer["expert"], answer["reason"]) == ("kq", "pinned")
    assert len(answer["token_ids"]) <= 3


def test_text_from_standard_input(built: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    expected = run("route", built, "the old river", "--json")
    monkeypatch.setattr(sys, "stdin", io.StringIO("the old river"))
    assert run("route", built, "-", "--json") == expected


def test_export(built: Path, run: Run, tmp_path: Path) -> None:
    said = run("export", built, "--to", "gguf", "--expert", "gptq", "--expert", "kq", "--out", tmp_path / "files")
    assert "gptq.gguf" in said
    assert (tmp_path / "files" / "kq.Modelfile").exists()
    found = json.loads(run("export", built, "--to", "gguf", "--expert", "rtn", "--out", tmp_path / "more", "--json"))
    assert found["experts"]["rtn"]["lossless"] is True


def test_inspect_and_verify(built: Path, run: Run) -> None:
    assert "gptq" in run("inspect", built)
    found = json.loads(run("inspect", built, "--verify", "--json"))
    assert found["verified"] is True
    assert set(found["certificates"]) == {"gptq", "rtn", "smooth", "kq"}


@pytest.mark.parametrize("terminal", [True, False])
def test_bars_are_for_terminals(
    terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR" if terminal else "NO_COLOR", "1")
    before = are_progress_bars_disabled()
    with cli.Bars().track("count [sheep]", 2) as advance:
        advance(1)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert ("count [sheep]" in shown.err, "left" in shown.err) == (terminal, terminal)
    assert are_progress_bars_disabled() is not terminal
    (disable_progress_bars if before else enable_progress_bars)()


def test_doctor(run: Run) -> None:
    found = json.loads(run("doctor", "--json"))
    assert {"versions", "machine", "devices", "optional"} == set(found)
    assert "torch" in run("doctor")
