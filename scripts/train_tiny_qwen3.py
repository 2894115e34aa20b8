"""Train `bundled:tiny-qwen3`, tokenizer and model, on text that every Python ships.

    python scripts/train_tiny_qwen3.py OUT          # OUT gets the model; OUT.train the checkpoint and the log

Notable choices
- The training text is the `/train` part of the bundled sources: held-out modules and topics are never seen, neither by
  the tokenizer nor by the model.
- Pre-tokenizer of Qwen2, so that llama.cpp's `qwen2` splits text as we do; byte-level BPE with 4096 entries.
- Muon for the matrices of the blocks, AdamW for the embedding and the norms: half the tokens of AdamW alone.
- Warm-up, constant rate, linear decay at the end: an interrupted run goes on where it was, and its length can be
  changed until the decay begins. The exported weights are an exponential moving average.
- Master weights float32, arithmetic bfloat16, stored bfloat16; every number reported is of the stored weights.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import math
import platform
import time
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from moqe.data.bundled import bundled_documents
from moqe.data.documents import Document
from moqe.data.windows import pack_windows, text_bytes
from moqe.store import digest_file, read_json, write_json

VOCABULARY, WINDOW, BATCH = 4096, 512, 4
WARM_UP, DECAY = 100, 1500
RATE, WEIGHT_DECAY, EMA = 3e-3, 0.1, 0.995
REPEATS = {"python-code": 1, "python-docstrings": 2, "python-topics": 3}  # per epoch; the small domains count more
END = "<|endoftext|>"
SPLIT = (  # the published pre-tokenizer of the Qwen2 family, which llama.cpp knows as `qwen2`
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
log = logging.getLogger("train_tiny_qwen3")


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE with one special token, `<|endoftext|>`, which ends documents and is never added by encoding."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 1, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(END, special=True, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=END, clean_up_tokenization_spaces=False
    )


def new_model(end: int) -> Qwen3ForCausalLM:
    """The architecture: 3.4 M parameters, rows of 256 or 512 so that K-quant super-blocks fit every linear."""
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=VOCABULARY,
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            max_position_embeddings=WINDOW,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=end,
            pad_token_id=end,
        )
    )


def new_optimizers(model: Qwen3ForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, its step scaled like AdamW's so that one rate serves both; AdamW for the rest."""
    blocks = [p for p in model.model.layers.parameters() if p.ndim == 2]
    norms = [p for p in model.parameters() if p.ndim == 1]
    embedding = model.model.embed_tokens.weight
    return [
        torch.optim.Muon(blocks, lr=RATE, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(
            [{"params": [embedding], "weight_decay": WEIGHT_DECAY}, {"params": norms, "weight_decay": 0.0}],
            lr=RATE,
            betas=(0.9, 0.95),
        ),
    ]


def epoch_batches(encoded: list[list[int]], epoch: int, seed: int) -> torch.Tensor:
    """The batches of an epoch: documents in random order, end to end, cut at a random phase. (steps, BATCH, WINDOW)"""
    generator = torch.Generator().manual_seed(seed * 1000 + epoch)
    order = torch.randperm(len(encoded), generator=generator).tolist()
    stream = torch.tensor([token for i in order for token in encoded[i]])
    stream = stream[int(torch.randint(WINDOW, (1,), generator=generator)) :]
    steps = len(stream) // (WINDOW * BATCH)
    windows = stream[: steps * BATCH * WINDOW].view(-1, WINDOW)
    return windows[torch.randperm(len(windows), generator=generator)].view(steps, BATCH, WINDOW)


def rate_at(step: int, steps: int) -> float:
    """The learning rate of a step: linear warm-up, constant, linear decay to zero."""
    return RATE * min(1.0, (step + 1) / WARM_UP, (steps - step) / DECAY)


def export(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the folder that `from_pretrained` reads, weights in bfloat16."""
    stored = copy.deepcopy(model).to(torch.bfloat16)
    stored.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    stored.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    settings = read_json(folder / "tokenizer_config.json")
    write_json(folder / "tokenizer_config.json", settings | {"tokenizer_class": "PreTrainedTokenizerFast"})
    for file in folder.iterdir():
        file.chmod(0o644)


def held_out(folder: Path, max_windows: int | None = None) -> dict[str, dict[str, float]]:
    """Perplexity and bits per byte of the stored model on the `/test` parts: packed windows of 256, all but the first
    token of each window scored.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    documents = [document for name in REPEATS for document in bundled_documents(f"bundled:{name}/test")]
    samples = pack_windows(documents, tokenizer, 256, max_windows)
    nats = []
    with torch.inference_mode():
        for batch in samples.tokens.split(16):
            logits = model(batch).logits[:, :-1].flatten(0, 1)
            nats.append(functional.cross_entropy(logits, batch[:, 1:].flatten(), reduction="none").view(len(batch), -1))
    loss = torch.cat(nats).sum(1).double()
    result = {}
    for domain in (*sorted(set(samples.domain)), "all"):
        rows = [i for i, label in enumerate(samples.domain) if domain in (label, "all")]
        scored = len(rows) * (samples.tokens.shape[1] - 1)
        total = float(loss[rows].sum())
        scored_bytes = sum(text_bytes(samples.tokens[rows, 1:], tokenizer))
        result[domain] = {
            "windows": len(rows),
            "perplexity": math.exp(total / scored),
            "bits_per_byte": total / math.log(2) / scored_bytes,
        }
    return result


def next_token_loss(model: Qwen3ForCausalLM, tokens: torch.Tensor) -> torch.Tensor:
    """Mean nats per token of a batch, (batch, window), every token but the first of a window scored."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(tokens, use_cache=False).logits
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


def train(out: Path, steps: int, seed: int, export_every: int, compiled: bool) -> None:
    """Train, or go on training from the checkpoint beside `out`, and write the model and `training.json`."""
    work = out.with_name(out.name + ".train")
    work.mkdir(parents=True, exist_ok=True)
    documents: dict[str, list[Document]] = {name: list(bundled_documents(f"bundled:{name}/train")) for name in REPEATS}
    tokenizer = train_tokenizer([document.text for group in documents.values() for document in group])
    end = tokenizer.eos_token_id
    encoded = [
        tokenizer(document.text)["input_ids"] + [end]
        for name, group in documents.items()
        for document in group
        for _ in range(REPEATS[name])
    ]
    log.info("%d tokens an epoch", sum(map(len, encoded)))

    torch.manual_seed(seed)
    model = new_model(end)
    average = copy.deepcopy(model)
    optimizers = new_optimizers(model)
    step, epoch, seconds = 0, 0, 0.0
    checkpoint = work / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step, seconds = state["step"], state["seconds"]
        log.info("going on from step %d", step)

    first_of_epoch = 0
    started = time.monotonic() - seconds
    model.train()
    loss_of = torch.compile(next_token_loss) if compiled else next_token_loss
    while step < steps:
        batches = epoch_batches(encoded, epoch, seed)
        while step - first_of_epoch < len(batches) and step < steps:
            tokens = batches[step - first_of_epoch]
            model.zero_grad()
            loss = loss_of(model, tokens)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = rate_at(step, steps)
                optimizer.step()
            step += 1
            decay = min(EMA, step / (step + 10))
            with torch.no_grad():
                for slow, fast in zip(average.parameters(), model.parameters(), strict=True):
                    slow.lerp_(fast, 1 - decay)
            if step % 50 == 0:
                seconds = time.monotonic() - started
                log.info("step %d of %d, epoch %d, loss %.3f, %.0f s", step, steps, epoch, loss.item(), seconds)
            if step % export_every == 0 or step == steps:
                seconds = time.monotonic() - started
                state = {"model": model.state_dict(), "average": average.state_dict()}
                state["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
                torch.save(state | {"step": step, "seconds": seconds}, checkpoint)
                export(average, tokenizer, out)
                log.info("step %d: %s", step, json.dumps(held_out(out, max_windows=96)))
        first_of_epoch += len(batches)
        epoch += 1

    report = {
        "seed": seed,
        "steps": steps,
        "tokens": steps * BATCH * WINDOW,
        "tokens_per_epoch": sum(map(len, encoded)),
        "seconds": round(seconds),
        "parameters": sum(p.numel() for p in model.parameters()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "held_out": held_out(out),
    }
    write_json(out / "training.json", report)
    write_json(
        out / "digests.json", {p.name: digest_file(p) for p in sorted(out.iterdir()) if p.name != "digests.json"}
    )


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the model")
    parser.add_argument("--steps", type=int, default=2800, help=f"optimizer steps of {BATCH} x {WINDOW} tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--export-every", type=int, default=500, help="steps between checkpoints")
    parser.add_argument("--compile", action="store_true", help="1.6 times faster, needs a C++ compiler")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    train(options.out, options.steps, options.seed, options.export_every, options.compile)


if __name__ == "__main__":
    main()
