"""What ships with MoQE so that it runs with no network: a tiny language model.

`tiny-qwen3` has Qwen3's architecture, 3.4 M parameters and its own tokenizer; docs/bundled-model.md says how it was
trained and how good it is. The folder is loadable by plain `from_pretrained`.
"""

from __future__ import annotations

from pathlib import Path

from moqe.errors import ModelError, RecipeError, did_you_mean
from moqe.recipe import Recipe, load_recipe
from moqe.store import digest_file, read_json

MODELS = ("tiny-qwen3",)


def bundled_model(name: str) -> Path:
    """The folder of a bundled model.

    Raises RecipeError when there is none of that name, ModelError when a file of it is not the one that was shipped.
    """
    if name not in MODELS:
        raise RecipeError(f"unknown bundled model {name!r}; {did_you_mean(name, MODELS)}")
    folder = Path(__file__).parent / name
    for file, digest in read_json(folder / "digests.json").items():
        if not (folder / file).is_file() or digest_file(folder / file) != digest:
            raise ModelError(f"{folder / file} is missing or damaged: install moqe again")
    return folder


def quickstart_recipe() -> Recipe:
    """The recipe of `moqe quickstart`: six 4-bit experts of the bundled model."""
    return load_recipe(Path(__file__).parent / "quickstart.yaml")
