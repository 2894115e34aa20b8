"""A build that is killed at any moment and started again ends with the bytes of an undisturbed one."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moqe.recipe import dump_recipe, parse_recipe
from test_pipeline import tree

BUILD = """
import sys, torch, moqe
torch.set_num_threads(1)
recipe = moqe.load_recipe(sys.argv[1])
print("ready", flush=True)
moqe.build(recipe, sys.argv[2])
"""
KILLS = 10
LONGEST_SECONDS = 4.0


def start(recipe: Path, folder: Path) -> subprocess.Popen[str]:
    """A build in another process, past its imports."""
    process = subprocess.Popen(
        [sys.executable, "-c", BUILD, str(recipe), str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    with process.stdout as said:
        assert said.readline() == "ready\n"
    return process


@pytest.mark.timeout(600)
def test_killed_ten_times(built: Path, tmp_path: Path, recipe_content: dict[str, Any]) -> None:
    recipe, folder = tmp_path / "recipe.yaml", tmp_path / "m"
    recipe.write_text(dump_recipe(parse_recipe(recipe_content)))
    moments = random.Random(0)
    killed = 0
    for _ in range(KILLS):
        process = start(recipe, folder)
        try:
            process.wait(moments.uniform(0.0, LONGEST_SECONDS))
        except subprocess.TimeoutExpired:
            process.kill()  # SIGKILL: no handler runs
            killed += 1
        process.wait()
        if process.returncode == 0:
            break
        assert not json_is_torn(folder)
    process = start(recipe, folder)
    assert process.wait(300) == 0
    assert killed >= 3
    assert tree(folder) == tree(built)


def json_is_torn(folder: Path) -> list[Path]:
    """Files under their final names that hold half of what they should."""
    torn = []
    for path in folder.rglob("*.json"):
        try:
            json.loads(path.read_text())
        except json.JSONDecodeError:
            torn.append(path)
    return torn
