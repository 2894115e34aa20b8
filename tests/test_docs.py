"""The documentation agrees with the code: every option is described with its default, every method has a page, links
lead somewhere, recipes parse, commands and Python are well formed.
"""

from __future__ import annotations

import ast
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from pydantic.fields import FieldInfo

import moqe
from moqe import recipe as recipe_module
from moqe.cli import app
from moqe.methods import METHODS, check
from moqe.methods.vision import VISION_METHODS
from moqe.methods.vision.check import check as check_image_expert
from moqe.recipe import Expert, Options
from moqe.schemes import SCHEMES

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SECTIONS = {
    "Recipe": "Top level",
    "Data": "data",
    "Preprocessing": "preprocessing",
    "Source": "A source",
    "Expert": "experts",
    "Gptq": "gptq",
    "Awq": "awq",
    "SmoothQuant": "smoothquant",
    "Rtn": "rtn",
    "Ptq": "ptq",
    "Qat": "qat",
    "Brecq": "brecq",
    "N2uq": "n2uq",
    "DsConv": "dsconv",
    "Distill": "distill",
    "Specialists": "specialists",
    "Router": "router",
    "Balance": "balance",
    "Protocol": "protocol",
}
"""The heading in docs/recipe.md under which the table of an options class stands."""

CLASSES = [found for found in vars(recipe_module).values() if isinstance(found, type) and issubclass(found, Options)]
CLASSES.remove(Options)

FENCE = re.compile(r"^```(\S+)(?: (\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def blocks(language: str, tag: str | None = None) -> list[Any]:
    """Fenced blocks of a language, and of a tag after it, as test parameters."""
    return [
        pytest.param(match[3], id=f"{page.relative_to(ROOT)}-{number}")
        for page in PAGES
        for number, match in enumerate(FENCE.finditer(page.read_text(encoding="utf-8")))
        if match[1] == language and (tag is None or match[2] == tag)
    ]


def shown(field: FieldInfo) -> str:
    """How a table of docs/recipe.md writes a field's default."""
    if field.is_required():
        return "required"
    default = field.get_default(call_default_factory=True)
    if isinstance(default, Options):
        return "see below"
    return f"`{default}`" if isinstance(default, str) and default else f"`{json.dumps(default)}`"


def rows(page: Path, heading: str | None = None) -> dict[str, list[str]]:
    """The cells of a page's table rows by the option that the first cell names, below one heading or anywhere."""
    text = page.read_text(encoding="utf-8")
    if heading is not None:
        match = re.search(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#|\Z)", text, re.MULTILINE | re.DOTALL)
        assert match, f"{page} has no heading {heading!r}"
        text = match[1]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return {match[1]: row for row in cells if (match := re.fullmatch(r"`(\w+)`", row[0]))}


@pytest.mark.parametrize("options", CLASSES, ids=lambda options: options.__name__)
def test_every_option_is_described_with_its_default(options: type[Options]) -> None:
    documented = rows(ROOT / "docs" / "recipe.md", SECTIONS[options.__name__])
    for name, field in options.model_fields.items():
        assert name in documented, f"docs/recipe.md, {SECTIONS[options.__name__]}: {name} is missing"
        assert documented[name][2] == shown(field), f"docs/recipe.md: the default of {name} is {shown(field)}"


@pytest.mark.parametrize("method", [*METHODS, *VISION_METHODS])
def test_every_method_has_a_page_that_names_its_options(method: str) -> None:
    page = ROOT / "docs" / "methods" / f"{method}.md"
    assert f"]({method}.md)" in (page.parent / "index.md").read_text(encoding="utf-8")
    if method in Expert.model_fields:
        section = Expert.model_fields[method].get_default()
        assert isinstance(section, Options)
        documented = rows(page)
        for name, field in type(section).model_fields.items():
            assert documented[name][1] == shown(field)


@pytest.mark.parametrize("method", METHODS)
def test_schemes_in_the_table_of_methods(method: str) -> None:
    text = (ROOT / "docs" / "methods" / "index.md").read_text(encoding="utf-8")
    row = next(line for line in text.splitlines() if line.startswith(f"| [{method}]"))
    described = row.split("|")[4]
    named = set(re.findall(r"`(\w+)`", described))
    for scheme in SCHEMES.values():
        family = "all block schemes" if scheme.is_block else "all integer schemes"
        makes = family in described or scheme.name in named
        assert makes == (METHODS[method].supports(scheme) == ""), f"{method} and {scheme.name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    targets = [target.split("#")[0] for target in LINK.findall(text) if not re.match(r"[a-z]+:", target)]
    missing = [target for target in targets if target and not (page.parent / target).exists()]
    assert not missing


@pytest.mark.parametrize("content", blocks("yaml", "recipe"))
def test_full_recipes_parse(content: str) -> None:
    moqe.parse_recipe(yaml.safe_load(content))


@pytest.mark.parametrize("content", blocks("yaml"))
def test_experts_in_examples_can_be_made(content: str) -> None:
    for entry in yaml.safe_load(content).get("experts", []):
        expert = Expert.model_validate(entry)
        if expert.method in VISION_METHODS:
            check_image_expert(expert)
        elif expert.method:
            check(expert)


@pytest.mark.parametrize("content", blocks("python"))
def test_python_is_well_formed(content: str) -> None:
    ast.parse(content)


@pytest.mark.parametrize("content", blocks("bash"))
def test_commands_exist_with_their_options(content: str) -> None:
    group: Any = typer.main.get_command(app)
    for line in content.splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["moqe"]:
            context = group.make_context("moqe", words[1:])
            verb = [*context._protected_args, *context.args]
            group.commands[verb[0]].make_context(verb[0], verb[1:], parent=context)
