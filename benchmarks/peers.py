"""Building experts here against llm-compressor: wall time and peak memory as ratios, perplexity side by side.

    python -m benchmarks.peers --base MODEL --data TEXTS --work FOLDER --peer PYTHON [--out docs/results.md]

MODEL and TEXTS as in `benchmarks.language`. PYTHON is the interpreter of an environment with llm-compressor 0.14, which
wants older packages than MoQE is tested with, so it has one of its own:

    python -m venv peer && peer/bin/pip install llmcompressor==0.14.0.1

Three experts on the same calibration tokens: gptq and rtn (4 bits, symmetric, groups of 64) and smoothquant (w8a8,
strength 0.5). Here they are made in one pass, by one process; there by one process each, which is how that tool is
used. Both sides begin with opening the model and end with the last file; starting Python and reading texts do not
count. Who is first changes from round to round. All experts are then scored by MoQE's reference runtime on the same
test windows, theirs read from the files they wrote.

Both start from float32 weights and store float32 scales. Here statistics are taken twice: with float32 products, as
there, and with `calibration_precision: bfloat16`. gptq searches its grids here and spans the extremes there. The last
column has 16-bit scales, which are the default here.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from benchmarks.interleaved import ratios
from benchmarks.language import make_recipe
from benchmarks.tables import table, write_section
from moqe.formats import open_expert
from moqe.recipe import Recipe, parse_recipe
from moqe.runtimes.reference import ReferenceRuntime
from moqe.tasks import LanguageTask

GROUP_SIZE = 64
EXPERTS: tuple[dict[str, Any], ...] = (
    {"name": "gptq", "method": "gptq", "scheme": "w4a16", "group_size": GROUP_SIZE},
    {"name": "smoothquant", "method": "smoothquant", "scheme": "w8a8", "smoothquant": {"alpha": 0.5}},
    {"name": "rtn", "method": "rtn", "scheme": "w4a16", "group_size": GROUP_SIZE},
)
PRECISIONS = ("float32", "bfloat16")  # of products while statistics are taken here
NARROW = "bfloat16-16"  # the same with 16-bit scales
THERE = "there"
THEIRS = Path(__file__).with_name("peers_llmcompressor.py")


def ours(recipe: Path, folder: Path, threads: int) -> dict[str, Any]:
    """Make all experts here, in one process."""
    shutil.rmtree(folder, ignore_errors=True)
    return _last_line([sys.executable, "-m", "benchmarks.peers_ours", str(recipe), str(folder), str(threads)])


def theirs(peer: str, base: Path, tokens: Path, folder: Path, threads: int) -> dict[str, dict[str, Any]]:
    """Make all experts with llm-compressor, by a process each."""
    shutil.rmtree(folder, ignore_errors=True)
    found = {}
    for expert in EXPERTS:
        name = expert["method"]
        asked = [str(name), str(base), str(tokens), str(folder / str(name)), str(GROUP_SIZE), str(threads)]
        found[str(name)] = _last_line([peer, str(THEIRS), *asked])
    return found


def _last_line(command: list[str]) -> dict[str, Any]:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command[:2])} failed:\n{done.stderr[-2000:]}")
    content: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return content


def perplexity(base: Any, folder: Path, tokens: torch.Tensor) -> float:
    """Of an expert's files, by the reference runtime."""
    return math.exp(float(ReferenceRuntime(base, open_expert(folder), name=folder.name).score(tokens).double().mean()))


def peers_recipe(options: argparse.Namespace, precision: str, scale_bits: int) -> Recipe:
    """The recipe of `benchmarks.language`, with the experts of this comparison."""
    content = make_recipe(options.base, options.data, options).to_mapping()
    data = content["data"] | {"calibration_precision": precision}
    experts = [expert | {"scale_bits": scale_bits} for expert in EXPERTS]
    return parse_recipe(content | {"data": data, "experts": experts})


def main() -> None:
    """Read the command line, measure, write the section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--peer", required=True, help="the Python of an environment with llm-compressor")
    parser.add_argument("--out", type=Path, default=Path("docs/results.md"))
    parser.add_argument("--calibration-samples", type=int, default=128)
    parser.add_argument("--router-samples", type=int, default=12)
    parser.add_argument("--test-samples", type=int, default=120)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    recipes = {precision: peers_recipe(options, precision, 32) for precision in PRECISIONS}
    recipes[NARROW] = peers_recipe(options, "bfloat16", 16)
    for name, recipe in recipes.items():
        (options.work / f"recipe-{name}.yaml").write_text(json.dumps(recipe.to_mapping()))
    splits = LanguageTask(recipes[NARROW], options.work / "splits").splits()
    calibration, test = splits["calibration"].tokens, splits["test"].tokens
    tokens = options.work / "tokens.safetensors"
    save_file({"tokens": calibration.contiguous()}, tokens)

    def run(side: str) -> dict[str, Any]:
        if side == THERE:
            return theirs(options.peer, options.base, tokens, options.work / "theirs", options.threads)
        return ours(options.work / f"recipe-{side}.yaml", options.work / f"ours-{side}", options.threads)

    sides = [*PRECISIONS, THERE]
    rounds: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for turn in range(options.rounds):
        for side in (*sides[turn % 3 :], *sides[: turn % 3]):
            rounds[side].append(run(side))
    run(NARROW)
    base: Any = AutoModelForCausalLM.from_pretrained(options.base, dtype=torch.float32).eval()
    full = math.exp(float(ReferenceRuntime(base).score(test).double().mean()))
    rows = []
    for name in (str(expert["name"]) for expert in EXPERTS):
        other = perplexity(base, options.work / "theirs" / name, test)
        row = [name, f"{other:.3f}"]
        for side in recipes:
            mine = perplexity(base, options.work / f"ours-{side}" / "experts" / name, test)
            row += [f"{mine:.3f} ({100 * (mine / other - 1):+.2f} %)"]
        rows.append([*row, ", ".join(f"{turn[name]['seconds']:.0f}" for turn in rounds[THERE])])
    total = [sum(found["seconds"] for found in turn.values()) for turn in rounds[THERE]]
    peak = [float(max(found["peak_bytes"] for found in turn.values())) for turn in rounds[THERE]]
    ratio_rows = [
        [
            f"statistics in {side}",
            ratios([turn["seconds"] for turn in rounds[side]], total).text(),
            ratios([float(turn["peak_bytes"]) for turn in rounds[side]], peak).text(),
            ", ".join(f"{turn['seconds']:.0f}" for turn in rounds[side]),
        ]
        for side in PRECISIONS
    ]
    versions = ", ".join(f"{name} {version}" for name, version in rounds[THERE][0]["gptq"]["versions"].items())
    text = f"""
## Building three experts: here against llm-compressor

{options.base.name}, {len(calibration)} calibration windows of {calibration.shape[1]} tokens, the same tokens on both
sides; {len(test)} test windows; {options.threads} threads on {platform.processor() or platform.machine()}. Theirs:
{versions}. Here: one process and one pass for all three, torch {torch.__version__}.

Here / there, {options.rounds} rounds, median (range); memory there is the largest of the three processes:

{table(["here", "wall time", "peak memory", "seconds here"], ratio_rows)}

Perplexity, and the difference from theirs:

{table(["expert", "there", "here", "here, bfloat16", "here, bfloat16, 16-bit scales", "seconds there"], rows)}

The full-precision model has {full:.3f}.
"""
    print(text)
    write_section(options.out, "peers", text)


if __name__ == "__main__":
    main()
