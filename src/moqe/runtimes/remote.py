"""An expert behind an OpenAI-compatible URL: vLLM, llama-server, or anything with `/completions` that takes token ids.

Specification: the completions endpoint of OpenAI's API, prompts as arrays of token ids. What is beside that standard
and needed: token ids of the answer, which vLLM gives as `token_ids` and llama-server as `id` in `logprobs`; and for
losses the log-probabilities of the prompt, `echo` with `logprobs`, which vLLM has and llama-server has not. A server
without one of them can still do the other; what it lacks is said when it is asked for.

Nothing here knows how the server computes, so its numbers belong to the server: they carry the name `remote`, and a
loss table takes them from one server for all experts or not at all.

The key, if the server wants one, is read from an environment variable when a request is made. It is written nowhere,
and a URL that holds one is refused.
"""

from __future__ import annotations

import json
import logging
import os
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from http.client import HTTPException
from typing import Any, NoReturn
from urllib.parse import urlsplit

import torch
from torch import Tensor

from moqe.errors import NumericalError, RemoteError
from moqe.runtimes.scoring import batches, check_windows

log = logging.getLogger("moqe")

_BATCH_TOKENS = 4096  # of windows that are sent in one request
_BUSY = frozenset({408, 429, 500, 502, 503, 504})  # answers that another try may change
_PAUSE_SECONDS = 0.5  # before the second try; doubled before each further one
_SHOWN = 300  # characters of a server's own message


class RemoteRuntime:
    """Asks a server. Satisfies `Runtime`, without `logits`.

    url: the API's root, such as `http://localhost:8000/v1`. model: the server's name for the expert. key_variable: the
    environment variable that holds the API key; empty sends none. timeout_seconds: how long one answer may take.
    tries: requests in all when the server cannot be reached or is busy. Nothing is sent before the first use.
    Raises RemoteError for a URL that is none or holds a password.
    """

    name = "remote"

    def __init__(
        self, url: str, model: str, *, key_variable: str = "", timeout_seconds: float = 120.0, tries: int = 3
    ) -> None:
        parts = urlsplit(url)
        if parts.username is not None or parts.password is not None:
            raise RemoteError(
                f"the URL for {parts.hostname} holds a user name or key: remove it, and name an environment variable "
                "as key_variable"
            )
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise RemoteError(f"{url!r} is no URL of a server: give its root, such as http://localhost:8000/v1")
        self.url, self.model = url.rstrip("/"), model
        self.key_variable, self.timeout_seconds, self.tries = key_variable, timeout_seconds, tries

    def score(self, tokens: Tensor) -> Tensor:
        """Loss of every next token: float32 nats, (n, window - 1), for int64 tokens, (n, window).

        Raises RemoteError when the server gives no log-probabilities of prompts, DataError for windows that are too
        short, NumericalError when a loss is not finite.
        """
        check_windows(tokens)
        losses = [self._score(part.tolist()) for part in batches(tokens, _BATCH_TOKENS)]
        result = torch.cat([torch.empty(0, tokens.shape[1] - 1), *losses])
        if not torch.isfinite(result).all():
            raise NumericalError(f"{self.url}: {self.model} gave a loss that is not finite")
        return result

    def logits(self, tokens: Tensor) -> NoReturn:
        """Raises RemoteError: the API has log-probabilities of the likeliest tokens only."""
        raise RemoteError(f"{self.url} gives no logits: run the expert in this process for that")

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

        A stop token ends the text and is not returned; the server ends it at its own end-of-text tokens too. Raises
        RemoteError when the server does not give the ids of its tokens.
        """
        body = {"prompt": tokens[0].tolist(), "max_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
        body |= {"logprobs": 1, "return_token_ids": True}
        if temperature > 0:
            body |= {"top_p": 1.0, "top_k": 0, "min_p": 0.0}  # servers have filters of their own otherwise
        answer = self._post(body)
        new = self._token_ids(answer)
        ends = [position for position, token in enumerate(new) if token in stop]
        return new[: ends[0]] if ends else new

    def _score(self, windows: list[list[int]]) -> Tensor:
        answer = self._post({"prompt": windows, "max_tokens": 1, "temperature": 0.0, "echo": True, "logprobs": 1})
        try:
            choices = sorted(answer["choices"], key=lambda choice: int(choice["index"]))
            found = [choice["logprobs"].get("token_logprobs") or [] for choice in choices]
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise self._unusable(f"is no list of completions ({type(error).__name__}: {error})") from error
        length = len(windows[0])
        if len(found) != len(windows) or any(len(values) not in (length, length + 1) for values in found):
            raise self._unusable(
                "has no log-probabilities of the prompt (`echo` with `logprobs`), without which an expert has no loss "
                "and cannot be in a loss table: use vLLM, or run the expert in this process"
            )
        if any(value is None for values in found for value in values[1:length]):
            raise self._unusable("lacks the log-probability of some tokens of the prompt")
        return -torch.tensor([values[1:length] for values in found], dtype=torch.float32)

    def _token_ids(self, answer: Any) -> list[int]:
        """The ids of an answer's tokens. Raises RemoteError where the server does not give all of them."""
        try:
            (choice,) = answer["choices"]
            if choice.get("token_ids") is not None:
                return [int(token) for token in choice["token_ids"]]
            content = (choice.get("logprobs") or {}).get("content") or []
            ids = [int(entry["id"]) for entry in content if "id" in entry]
            made = int(answer["usage"]["completion_tokens"])
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise self._unusable(f"is no completion ({type(error).__name__}: {error})") from error
        if made - len(ids) not in (0, 1):  # one may be the end-of-text token, which is counted and not shown
            raise self._unusable(
                f"gives the ids of {len(ids)} of {made} tokens: use a server that returns `token_ids`, such as vLLM"
            )
        return ids

    def _post(self, body: dict[str, Any]) -> Any:
        """The server's answer to a request for completions. Raises RemoteError, naming the URL."""
        url = f"{self.url}/completions"
        content = json.dumps({"model": self.model, **body}).encode()
        for attempt in range(1, self.tries + 1):
            request = urllib.request.Request(url, content, self._headers())
            try:
                with urllib.request.urlopen(request, timeout=self.timeout_seconds) as answer:
                    return json.load(answer)
            except urllib.error.HTTPError as error:
                reason = f"answered {error.code}: {error.read().decode(errors='replace')[:_SHOWN]}"
                if error.code not in _BUSY:
                    raise RemoteError(f"{url} {reason}") from None
            except ValueError as error:
                raise RemoteError(f"{url} did not answer with JSON ({error}): is it the root of the API?") from None
            except TimeoutError:
                reason = f"did not answer within {self.timeout_seconds:g} s"
            except urllib.error.URLError as error:
                timed_out = isinstance(error.reason, TimeoutError)
                reason = (
                    f"did not answer within {self.timeout_seconds:g} s"
                    if timed_out
                    else f"cannot be reached ({error.reason})"
                )
            except (HTTPException, ConnectionError) as error:
                reason = f"broke off ({type(error).__name__})"
            if attempt < self.tries:
                log.info("%s %s; trying again", url, reason)
                time.sleep(_PAUSE_SECONDS * 2 ** (attempt - 1))
        raise RemoteError(f"{url} {reason}; tried {self.tries} times")

    def _headers(self) -> dict[str, str]:
        headers = {"Content-Type": "application/json"}
        if self.key_variable:
            key = os.environ.get(self.key_variable)
            if not key:
                raise RemoteError(f"{self.url} wants a key and the environment variable {self.key_variable} is not set")
            headers["Authorization"] = f"Bearer {key}"
        return headers

    def _unusable(self, what: str) -> RemoteError:
        return RemoteError(f"the answer of {self.url} for {self.model} {what}")
