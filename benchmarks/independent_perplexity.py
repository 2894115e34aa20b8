"""Perplexity of a base model in ten lines that share nothing with MoQE but the token windows.

    python -m benchmarks.independent_perplexity MODEL WINDOWS.npy

WINDOWS.npy holds int64 token windows, (n, window); every token after the first of a window is predicted.
"""

import math
import sys

import numpy as np
import torch
from transformers import AutoModelForCausalLM

if __name__ == "__main__":
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
    nats, tokens = 0.0, 0
    for window in torch.from_numpy(np.load(sys.argv[2])):
        with torch.no_grad():
            loss = model(window[None], labels=window[None]).loss  # transformers' own shift and mean
        nats, tokens = nats + float(loss) * (len(window) - 1), tokens + len(window) - 1
    print(math.exp(nats / tokens))
