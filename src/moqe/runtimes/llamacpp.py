"""llama.cpp in this process, on a GGUF expert: ours, exported ones, and anybody's.

Through the wheel `xllamacpp` (extra `gguf`), which runs llama.cpp's own server on a thread and lets it listen on the
loopback address, behind a key made for it. Token ids go in and come out.

Losses. llama.cpp's server gives probabilities for tokens it generates, not for those of a prompt, and asking for them
token by token takes a whole vocabulary of JSON each. But it gives the hidden state of every token in one pass
(embeddings without pooling, which are the states after the final norm), and only the head is between these and the
logits. So the blocks run in llama.cpp, with its kernels, its rounding of inputs to 8 bits and its cache; the head of
the same file is applied here, in float32. What differs from llama.cpp's own logits is its rounding in the head alone:
where the head is quantized its inputs are rounded too, where it is bfloat16 they are rounded to bfloat16.

Text. Greedy or drawn from all tokens, without the filters and penalties that llama.cpp has by default. It stops at the
file's own end-of-text tokens even if they are not asked for; draws with a seed repeat, but are not the reference's.

Cost: the file's pages, mapped, plus copies that llama.cpp rearranges for the processor; scoring and generation each
start an engine of their own when first used. Losses of one file differ in last digits with the number of threads.
"""

from __future__ import annotations

import json
import secrets
import urllib.error
import urllib.request
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moqe.errors import CheckpointError, DataError, MissingExtra, MoqeError
from moqe.formats.gguf_files import GgufFiles
from moqe.formats.gguf_split import gguf_paths
from moqe.quantized import BlockTensor, IntegerTensor
from moqe.runtimes.scoring import check_windows, finite_losses, token_losses

_HEADS = ("lm_head.weight", "model.embed_tokens.weight")  # the second where the two are tied


class LlamaCppRuntime:
    """Runs one GGUF expert on the CPU in llama.cpp. Satisfies `Runtime`.

    path: a `.gguf` file, or the folder of a split one. name: the expert's, for errors. threads: of one forward pass; 0
    takes as many as torch. context_tokens: the longest window to score, and the longest prompt with its continuation.
    Nothing is loaded before the first use. Raises CheckpointError when the files are missing, damaged or of an
    architecture MoQE does not know, MissingExtra without the package xllamacpp.
    """

    name = "llama.cpp"

    def __init__(self, path: Path, *, name: str = "", threads: int = 0, context_tokens: int = 2048) -> None:
        self.path, self.expert_name = path, name or path.stem
        self.threads, self.context_tokens = threads, context_tokens
        self._files = GgufFiles(path)
        self._first = gguf_paths(path)[0]
        self._scoring: _Engine | None = None
        self._generating: _Engine | None = None

    def release(self) -> None:
        """Stop the engines and give their memory back; the next use starts them again."""
        self._scoring = self._generating = None
        self.__dict__.pop("_head", None)

    def score(self, tokens: Tensor) -> Tensor:
        """Loss of every next token: float32 nats, (n, window - 1), for int64 tokens, (n, window).

        Raises DataError for windows that are too short or longer than the context, NumericalError, naming the expert,
        when a loss is not finite.
        """
        check_windows(tokens)
        losses = torch.empty(len(tokens), tokens.shape[1] - 1)
        for row, window in enumerate(tokens):
            losses[row] = token_losses(self._hidden(window[:-1]), window[1:].cpu(), self._logits, len(self._head))
        return finite_losses(losses, self.expert_name)

    def logits(self, tokens: Tensor) -> Tensor:
        """Logits at every position: float32, (n, window, vocabulary), for int64 tokens, (n, window)."""
        return torch.stack([self._logits(self._hidden(window)) for window in tokens])

    def generate(
        self,
        tokens: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        seed: int = 0,
        stop: Sequence[int] = (),
    ) -> list[int]:
        """Continue a prompt, (1, t), by at most `max_new_tokens`; greedy at temperature 0, else drawn with `seed`.

        A stop token ends the text and is not returned. Raises DataError when prompt and continuation exceed the
        context.
        """
        self._check_length(tokens.shape[1] + max_new_tokens)
        if self._generating is None:
            self._generating = _Engine(self._first, self.threads, self.context_tokens, scoring=False)
        answer = self._generating.post(
            "completion",
            {
                "prompt": tokens[0].tolist(),
                "n_predict": max_new_tokens,
                "temperature": temperature,
                "seed": seed,
                "samplers": ["temperature"],
                "cache_prompt": False,
                "return_tokens": True,
            },
        )
        new: list[int] = answer["tokens"]
        ends = [position for position, token in enumerate(new) if token in stop]
        return new[: ends[0]] if ends else new

    def _hidden(self, window: Tensor) -> Tensor:
        """Normalised hidden states of tokens, (t,): float32, (t, hidden)."""
        self._check_length(len(window))
        if self._scoring is None:
            self._scoring = _Engine(self._first, self.threads, self.context_tokens, scoring=True)
        (answer,) = self._scoring.post("embeddings", {"input": [window.tolist()]})
        states = torch.tensor(answer["embedding"], dtype=torch.float32)
        if states.shape != (len(window), self._head.shape[1]):
            raise MoqeError(f"llama.cpp gave states of shape {tuple(states.shape)} for {len(window)} tokens")
        return states

    def _logits(self, states: Tensor) -> Tensor:
        return nn.functional.linear(states, self._head)

    def _check_length(self, length: int) -> None:
        if length > self.context_tokens:
            raise DataError(
                f"{length} tokens do not fit the context of {self.context_tokens} that llama.cpp was given for "
                f"{self.expert_name}: shorten the input, or raise context_tokens"
            )

    @cached_property
    def _head(self) -> Tensor:
        """The output matrix of the file: float32, (vocabulary, hidden)."""
        for name in _HEADS:
            if self._files.holds(name):
                value = self._files.load(name)
                return value.dequantize() if isinstance(value, IntegerTensor | BlockTensor) else value.float()
        raise CheckpointError(f"{self.path} has neither a head nor embeddings: build or download it again")


class _Engine:
    """A server of llama.cpp on one file. scoring: it gives hidden states of all tokens at once."""

    def __init__(self, path: Path, threads: int, context_tokens: int, *, scoring: bool) -> None:
        xllamacpp = require_xllamacpp("running a GGUF expert in llama.cpp")
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.warmup, params.verbosity = context_tokens, 1, False, 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads or torch.get_num_threads()
        self._key = secrets.token_hex(16)  # other users of this machine can reach the loopback address too
        params.api_keys = [self._key]
        if scoring:
            params.embedding = True
            params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_NONE
            params.n_batch = params.n_ubatch = context_tokens
        try:
            self._server = xllamacpp.Server(params)
        except RuntimeError as error:
            raise CheckpointError(f"{path} cannot be loaded by llama.cpp: build or download it again") from error
        # Whatever proxy the environment names is not for an address of this process.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """The server's answer. Raises MoqeError with its message when it refuses."""
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self._key}"}
        request = urllib.request.Request(f"{self._server.listening_address}/{path}", json.dumps(body).encode(), headers)
        try:
            with self._opener.open(request) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise MoqeError(f"llama.cpp refused to answer ({error.read().decode(errors='replace')})") from error


def require_xllamacpp(purpose: str) -> Any:
    """The package xllamacpp. Raises MissingExtra when it is not installed."""
    try:
        import xllamacpp
    except ModuleNotFoundError:
        raise MissingExtra("xllamacpp", "gguf", purpose) from None
    return xllamacpp
