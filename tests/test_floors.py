"""The floors of the design: a file imports from its own floor or a lower one."""

from __future__ import annotations

import ast
from pathlib import Path

import moqe

ROOT = Path(moqe.__file__).parent
FLOORS = {
    0: {
        "errors",
        "options",
        "method_options",
        "data_options",
        "expert_options",
        "router_options",
        "recipe",
        "store",
        "schemes",
        "quantized",
        "folder",
        "progress",
        "version",
    },
    1: {"methods", "formats", "models", "data", "bundled"},
    2: {"runtimes"},
    3: {"router", "tasks"},
    4: {"mixture", "evaluate"},
    5: {"advice", "build", "measure", "doctor", "export", "speed", "verbs"},
    6: {"cli"},
}
FLOOR_OF = {name: floor for floor, names in FLOORS.items() for name in names}
# A quantized tensor decodes itself through the format that owns its layout; imported when called.
EXCEPTIONS = {("quantized", "formats")}


def part_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported_parts(path: Path) -> set[str]:
    names = [
        node.module
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0
    ]
    return {name.split(".")[1] for name in names if name.startswith("moqe.")}


def test_every_part_has_a_floor() -> None:
    parts = {part_of(path) for path in ROOT.rglob("*.py")} - {"__init__", "__main__"}
    assert parts == set(FLOOR_OF)


def test_no_file_imports_from_a_higher_floor() -> None:
    climbing = [
        f"{path.relative_to(ROOT)} imports moqe.{imported}"
        for path in sorted(ROOT.rglob("*.py"))
        for imported in sorted(imported_parts(path))
        if part_of(path) in FLOOR_OF
        and FLOOR_OF[imported] > FLOOR_OF[part_of(path)]
        and (part_of(path), imported) not in EXCEPTIONS
    ]
    assert climbing == []
