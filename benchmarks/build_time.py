"""One calibration pass for five experts against one pass per expert: wall time as ratios, interleaved, with spread.

    python -m benchmarks.build_time --base MODEL --data TEXTS --work FOLDER [--out docs/results.md] [--blocks 6]

MODEL and TEXTS as in `benchmarks.language`. The cost is the same in every block, so the model is cut to its first
`--blocks` blocks and the ratio is that of the whole. Both ways make the same files (checked).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import statistics
import time
from pathlib import Path

from safetensors.torch import load_file, save_file

from benchmarks.language import experts, make_recipe
from benchmarks.language_mixtures import INT4
from benchmarks.tables import table, write_section
from moqe.progress import Silent
from moqe.recipe import Recipe
from moqe.tasks import LanguageTask


def truncate(base: Path, folder: Path, blocks: int) -> Path:
    """A copy of a Llama-like model with its first blocks only."""
    if folder.exists():
        return folder
    folder.mkdir(parents=True)
    for path in base.iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, folder / path.name)
    config = json.loads((base / "config.json").read_text())
    config["num_hidden_layers"] = blocks
    (folder / "config.json").write_text(json.dumps(config))
    weights = {
        name: tensor
        for path in sorted(base.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
        if not name.startswith("model.layers.") or int(name.split(".")[2]) < blocks
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def seconds(recipe: Recipe, folder: Path) -> float:
    """Wall time of making a recipe's experts, from opening the base to the last file."""
    start = time.perf_counter()
    task = LanguageTask(recipe, folder)
    task.make_experts(Silent())
    return time.perf_counter() - start


def digests(folder: Path) -> dict[str, str]:
    """Content of an expert's files."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def main() -> None:
    """Read the command line, measure, write the section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("docs/results.md"))
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--windows", type=int, default=256, help="calibration windows of 256 tokens")
    parser.add_argument("--repeats", type=int, default=2)
    options = parser.parse_args()
    base = truncate(options.base, options.work / f"base-{options.blocks}", options.blocks)
    counts = argparse.Namespace(calibration_samples=options.windows, router_samples=12, test_samples=12)
    whole = make_recipe(base, options.data, counts)
    chosen = [expert for expert in whole.experts if expert.name in INT4]
    assert len(chosen) == len(INT4) <= len(experts())
    together = whole.model_copy(update={"experts": tuple(chosen)})
    rows, ratios = [], []
    for repeat in range(options.repeats):
        shutil.rmtree(options.work / "timed", ignore_errors=True)
        one_pass = seconds(together, options.work / "timed" / "together")
        separate = {}
        for expert in chosen:
            alone = whole.model_copy(update={"experts": (expert,)})
            separate[expert.name] = seconds(alone, options.work / "timed" / expert.name)
            places = [options.work / "timed" / name / "experts" / expert.name for name in ("together", expert.name)]
            assert digests(places[0]) == digests(places[1]), f"{expert.name} differs between one pass and its own"
        ratios.append(sum(separate.values()) / one_pass)
        parts = ", ".join(f"{name} {value:.0f}" for name, value in separate.items())
        rows.append([str(repeat + 1), f"{one_pass:.1f}", f"{sum(separate.values()):.1f}", f"{ratios[-1]:.2f}", parts])
    text = f"""
## Building five experts: one pass against five

The first {options.blocks} blocks of {options.base.name}, {options.windows} calibration windows of 256 tokens, int4
experts ({", ".join(INT4)}). Ratio: median {statistics.median(ratios):.2f}, range {min(ratios):.2f} to
{max(ratios):.2f}.
The files of both ways are equal byte for byte.

{table(["run", "one pass, s", "five passes, s", "ratio", "each alone, s"], rows)}
"""
    write_section(options.out, "language-build-time", text)


if __name__ == "__main__":
    main()
