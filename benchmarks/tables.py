"""Markdown tables and marked sections of a document that a command writes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moqe.store import write_text


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column is left-aligned, the others right."""
    lines = [" | ".join(header), " | ".join([":---", *["---:"] * (len(header) - 1)])]
    lines += [" | ".join(row) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)


def write_section(path: Path, name: str, content: str) -> None:
    """Replace the section between `<!-- name -->` and `<!-- /name -->`, or append it."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    section = f"{begin}\n{content.strip()}\n{end}"
    text = path.read_text(encoding="utf-8") if path.exists() else "# Results\n"
    if begin in text and end in text:
        before, after = text[: text.index(begin)], text[text.index(end) + len(end) :]
        write_text(path, before + section + after)
    else:
        write_text(path, text.rstrip() + "\n\n" + section + "\n")
