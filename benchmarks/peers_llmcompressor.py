"""llm-compressor's side of `benchmarks.peers`; run by a Python that has it. One method, one process.

    python benchmarks/peers_llmcompressor.py METHOD MODEL TOKENS.safetensors OUT

Prints one line of JSON: seconds from opening the model to the last file, and the peak memory of the process.
"""

from __future__ import annotations

import importlib.metadata
import json
import resource
import sys
import time
from typing import Any

BATCH = 8


def recipe(method: str, group_size: int) -> list[Any]:
    """The modifiers of a method: int4 in groups for gptq and rtn, int8 weights and activations for smoothquant."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    weights = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=group_size)
    groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}
    if method == "gptq":
        return [GPTQModifier(config_groups=groups, ignore=["lm_head"])]
    if method == "rtn":
        return [QuantizationModifier(config_groups=groups, ignore=["lm_head"])]
    smoothing = SmoothQuantModifier(smoothing_strength=0.5)
    return [smoothing, QuantizationModifier(targets="Linear", scheme="W8A8", ignore=["lm_head"])]


def main() -> None:
    """Quantize, save, report."""
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    method, base, tokens, out, group_size, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    windows = load_file(tokens)["tokens"]
    rows = windows.tolist()
    dataset = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    calibration = {} if method == "rtn" else {"dataset": dataset, "num_calibration_samples": len(rows)}
    if calibration:
        calibration |= {"max_seq_length": windows.shape[1], "batch_size": BATCH, "shuffle_calibration_samples": False}
    oneshot(model=model, recipe=recipe(method, int(group_size)), **calibration)
    model.save_pretrained(out, save_compressed=True)
    AutoTokenizer.from_pretrained(base).save_pretrained(out)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    versions = {name: importlib.metadata.version(name) for name in ("llmcompressor", "transformers", "torch")}
    sys.stdout.write(json.dumps({"seconds": seconds, "peak_bytes": peak, "versions": versions}) + "\n")


if __name__ == "__main__":
    main()
