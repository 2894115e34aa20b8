"""Verbs of the command line that are one call of another part: build the example, open a mixture and ask it once.

To ask more than once open the mixture yourself, `moqe.load(folder)`: experts are then read once.
"""

from __future__ import annotations

from pathlib import Path

from moqe.build import BuildResult, build
from moqe.bundled import quickstart_recipe
from moqe.mixture import Classification, Decision, Generation, load
from moqe.progress import Progress


def quickstart(
    folder: Path | str = "moqe-quickstart",
    *,
    task: str = "language",
    device: str = "cpu",
    progress: Progress | None = None,
) -> BuildResult:
    """Build and judge a mixture of the bundled model of a task.

    Raises RecipeError on an unknown task, and what `build` raises.
    """
    return build(quickstart_recipe(task), folder, device=device, progress=progress)


def route(
    folder: Path | str,
    sample: Path | str,
    *,
    protocol: str | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Decision:
    """Which expert the router sends an input to: a text, or the path of an image. Raises as `Mixture.route` does."""
    return load(folder, device, progress).route(sample, protocol=protocol)


def generate(
    folder: Path | str,
    text: str,
    *,
    expert: str | None = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    runtime: str | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Generation:
    """Continue a text with the routed expert, or with `expert`.

    runtime: what runs it, as in `moqe.load`. Raises as `moqe.load` and `LanguageMixture.generate` do.
    """
    answer: Generation = load(folder, device, progress, runtime).generate(
        text, expert=expert, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed
    )
    return answer


def classify(
    folder: Path | str,
    image: Path | str,
    *,
    expert: str | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Classification:
    """Name what an image shows, by the mixture's policy or with `expert`. Raises as `ImageMixture.classify` does."""
    answer: Classification = load(folder, device, progress).classify(image, expert=expert)
    return answer
