"""Do others run our files as we do? transformers on compressed-tensors folders, llama.cpp on GGUF.

    python -m benchmarks.agreement --base MODEL --experts FOLDER [--name SECTION] [--out docs/results.md]

FOLDER is the `experts` folder of a mixture. transformers: largest difference of the logits on a text, plain
`AutoModelForCausalLM.from_pretrained` against the reference runtime. llama.cpp (through xllamacpp, float32 cache, no
flash attention): ten prompts, given as token ids and continued greedily by 16 tokens; equal continuations are counted,
and where one parts from the reference's, how much less probable the reference finds llama.cpp's token (nats). llama.cpp
rounds the inputs of quantized linears to 8 bits, which the reference does not; so the comparison is made twice:
with the reference's inputs rounded as ggml's (see `ggml_arithmetic`), and with the reference as it is. Rounding makes
a network chaotic: what one order of summation rounds down, another rounds up. How far that goes is measured too, by the
rounded reference against itself with its embeddings moved by one part in a million.
"""

from __future__ import annotations

import argparse
import json
import urllib.request
from pathlib import Path
from typing import Any

import torch
import xllamacpp
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.ggml_arithmetic import round_inputs_as_ggml
from benchmarks.tables import table, write_section
from moqe.formats import open_expert
from moqe.runtimes.reference import ReferenceRuntime

TOKENS = 16
LLAMA_HEADER = [
    "expert",
    "llama.cpp = rounded reference",
    "largest gap, nats",
    "llama.cpp = reference",
    "largest gap, nats",
    "rounded reference = itself, moved by 1e-6",
    "largest gap, nats",
]
NOISE = 1e-6
TEXT = "The mixture is better than its best expert, or the report says that it is not. def route(self, text): return"
PROMPTS = (
    "def __init__(self, name, value):\n        self.name = name\n        self.",
    "    if not isinstance(value, int):\n        raise TypeError(",
    "import os\nimport sys\nimport re\n",
    "for i in range(len(",
    "    try:\n        import",
    "with open(filename, 'rb') as",
    "The capital of France is",
    "Return True if the",
    "Once upon a time there was a",
    "one, two, three, four, five, six,",
)


class LlamaCpp:
    """llama.cpp on one GGUF file."""

    def __init__(self, path: Path) -> None:
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.warmup, params.verbosity = 512, 1, False, 0
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._server = xllamacpp.Server(params)

    def greedy(self, tokens: list[int]) -> list[int]:
        """The next tokens."""
        body = {"prompt": tokens, "n_predict": TOKENS, "temperature": 0, "return_tokens": True}
        body |= {"cache_prompt": False, "ignore_eos": True}
        url = f"{self._server.listening_address}/completion"
        request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as answer:
            found: list[int] = json.load(answer)["tokens"]
        return found


def transformers_row(folder: Path, runtime: ReferenceRuntime, tokenizer: Any) -> list[str]:
    """Largest logit difference between transformers and the reference."""
    tokens = torch.tensor([tokenizer(TEXT)["input_ids"]])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        theirs = model(tokens).logits
    ours = runtime.logits(tokens)
    equal = int((theirs.argmax(-1) == ours.argmax(-1)).sum())
    difference = float((theirs - ours).abs().max())
    return [folder.name, f"{difference:.1e}", f"{equal} of {tokens.shape[1]}", f"{float(ours.abs().max()):.1f}"]


def llama_row(folder: Path, base: Any, tokenizer: Any) -> list[str]:
    """How many prompts llama.cpp continues as the reference does, and by how much the others were not a tie."""
    engine, files = LlamaCpp(min(folder.glob("*.gguf"))), open_expert(folder)
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    stored = getattr(torch, json.loads((folder.parent.parent / "shared" / "config.json").read_text())["dtype"])

    def runtime(rounded: bool, noise: float = 0.0) -> ReferenceRuntime:
        made = ReferenceRuntime(base, files, name=folder.name)
        model: Any = made.model()
        if rounded:
            round_inputs_as_ggml(model, files, model.get_output_embeddings(), stored)
        if noise:
            random = torch.Generator().manual_seed(0)
            model.get_input_embeddings().register_forward_hook(
                lambda module, inputs, output: output * (1 + noise * torch.randn(output.shape, generator=random))
            )
        return made

    engines = [engine.greedy(ids) for ids in prompts]
    rounded, moved = runtime(True), runtime(True, NOISE)
    itself = [moved.generate(torch.tensor([ids]), TOKENS) for ids in prompts]
    return [
        folder.name,
        *compared(rounded, prompts, engines),
        *compared(runtime(False), prompts, engines),
        *compared(rounded, prompts, itself),
    ]


def compared(runtime: ReferenceRuntime, prompts: list[list[int]], answers: list[list[int]]) -> tuple[str, str]:
    """How many answers are the runtime's own, and how much less probable it finds the others' first other token."""
    equal, partings = 0, []
    for ids, answer in zip(prompts, answers, strict=True):
        ours = runtime.generate(torch.tensor([ids]), TOKENS)
        if ours == answer:
            equal += 1
            continue
        at = next(i for i, (a, b) in enumerate(zip(ours, answer, strict=True)) if a != b)
        last = runtime.logits(torch.tensor([ids + ours[:at]]))[0, -1].log_softmax(-1)
        partings.append(float(last[ours[at]] - last[answer[at]]))
    return f"{equal} of {len(prompts)}", f"{max(partings):.3f}" if partings else "none"


def main() -> None:
    """Read the command line, compare every expert, write the section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--experts", type=Path, required=True)
    parser.add_argument("--name", default="agreement")
    parser.add_argument("--out", type=Path, default=Path("docs/results.md"))
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.base)
    base = AutoModelForCausalLM.from_pretrained(options.base, dtype=torch.float32).eval()
    folders, files = [], []
    for folder in sorted(path for path in options.experts.iterdir() if path.is_dir()):
        if any(folder.glob("*.gguf")):
            files.append(llama_row(folder, base, tokenizer))
        elif not is_asymmetric(folder):
            runtime = ReferenceRuntime(base, open_expert(folder), name=folder.name)
            folders.append(transformers_row(folder, runtime, tokenizer))
    text = f"""
## Agreement on {options.base.name}

transformers against the reference runtime, float32 logits on one text (asymmetric packed experts, which plain
transformers cannot load, are left out):

{table(["expert", "largest logit difference", "same top token", "largest logit"], folders)}

llama.cpp against the reference runtime, {TOKENS} greedy tokens after each of {len(PROMPTS)} prompts: continuations that
are equal, and at the first other token of the rest, how much less probable the reference finds it. "Rounded": inputs of
linears rounded to 8 bits as ggml's CPU kernels do. The last two columns are no comparison with llama.cpp: they say how
far that rounding lets two orders of summation part. A negative gap: run in one pass instead of token by token, the
rounded reference itself prefers the other token.

{table(LLAMA_HEADER, files)}
"""
    write_section(options.out, options.name, text)


def is_asymmetric(folder: Path) -> bool:
    """Whether a compressed-tensors folder has zero points."""
    config = json.loads((folder / "config.json").read_text())
    groups = config["quantization_config"]["config_groups"].values()
    return any(not group["weights"]["symmetric"] for group in groups)


if __name__ == "__main__":
    main()
