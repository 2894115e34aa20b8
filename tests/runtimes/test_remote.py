"""Experts behind a URL: a server of this test around the reference runtime, and llama.cpp's own."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

import moqe
from moqe.errors import DataError, NumericalError, RemoteError
from moqe.export import export
from moqe.runtimes import remote
from moqe.runtimes.llamacpp import LlamaCppRuntime
from moqe.runtimes.reference import ReferenceRuntime
from moqe.runtimes.remote import RemoteRuntime

KEY = "a-secret-key"


@dataclass
class Served:
    """A server of completions as vLLM answers them, with faults on demand."""

    runtime: ReferenceRuntime
    url: str = ""
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    faults: list[int] = field(default_factory=list)  # status codes of the next answers
    change: Any = None  # what to do to an answer before it is sent
    raw: bytes | None = None  # sent in place of an answer
    delay: threading.Event | None = None

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        prompts = body["prompt"] if isinstance(body["prompt"][0], list) else [body["prompt"]]
        choices, made = [], 0
        for index, prompt in enumerate(prompts):
            tokens = torch.tensor([prompt])
            new = self.runtime.generate(
                tokens, body["max_tokens"], temperature=body["temperature"], seed=body.get("seed", 0)
            )
            made += len(new)
            choice: dict[str, Any] = {"index": index, "text": "", "token_ids": None, "logprobs": {}}
            if body.get("return_token_ids"):
                choice["token_ids"] = new
            if body.get("echo"):
                losses = self.runtime.score(torch.tensor([prompt + new]))[0].tolist()
                choice["logprobs"] = {"token_logprobs": [None, *(-loss for loss in losses)]}
            choices.insert(0, choice)  # in another order than asked
        return {"choices": choices, "usage": {"completion_tokens": made}}


class Handler(BaseHTTPRequestHandler):
    served: Served

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        served = self.served
        served.requests.append(body)
        served.headers.append(dict(self.headers))
        if served.delay is not None:
            served.delay.wait(10)
        status = served.faults.pop(0) if served.faults else 200
        answer = served.answer(body) if status == 200 and served.raw is None else {"error": "no room for this"}
        if served.change is not None:
            served.change(answer)
        content = served.raw if served.raw is not None else json.dumps(answer).encode()
        self.send_response(status if self.path == "/v1/completions" else 404)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def reference(built: Path) -> ReferenceRuntime:
    runtime = moqe.load(built).runtime("gptq")
    assert isinstance(runtime, ReferenceRuntime)
    return runtime


@pytest.fixture
def served(reference: ReferenceRuntime, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    monkeypatch.setattr(remote, "_PAUSE_SECONDS", 0.01)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    state = Served(reference)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"served": state}))
    server.daemon_threads = True
    state.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield state
    if state.delay is not None:
        state.delay.set()
    server.shutdown()
    thread.join()
    server.server_close()


def windows(n: int = 5) -> torch.Tensor:
    return torch.arange(n * 12).view(n, 12) * 7 % 300


def test_losses_are_the_servers(served: Served, reference: ReferenceRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_BATCH_TOKENS", 24)
    tokens = windows()
    found = RemoteRuntime(served.url, "gptq").score(tokens)
    torch.testing.assert_close(found, reference.score(tokens), atol=1e-4, rtol=1e-4)
    assert [len(request["prompt"]) for request in served.requests] == [2, 2, 1]
    assert {request["model"] for request in served.requests} == {"gptq"}
    assert RemoteRuntime(served.url, "gptq").score(tokens[:0]).shape == (0, 11)


def test_text_is_the_servers(served: Served, reference: ReferenceRuntime) -> None:
    runtime, prompt = RemoteRuntime(served.url + "/", "gptq"), windows(1)
    text = reference.generate(prompt, 8)
    assert runtime.generate(prompt, 8) == text
    assert runtime.generate(prompt, 8, stop=[text[3]]) == text[: text.index(text[3])]
    drawn = runtime.generate(prompt, 8, temperature=2.0, seed=5)
    assert drawn == reference.generate(prompt, 8, temperature=2.0, seed=5)
    assert served.requests[-1]["top_k"] == 0


def test_a_key_is_sent_and_never_shown(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG", logger="moqe")
    monkeypatch.setenv("TEST_KEY", KEY)
    runtime = RemoteRuntime(served.url, "gptq", key_variable="TEST_KEY")
    served.faults = [503, 401]
    with pytest.raises(RemoteError, match="answered 401") as error:
        runtime.score(windows(1))
    assert [headers["Authorization"] for headers in served.headers] == [f"Bearer {KEY}"] * 2
    assert "503" in caplog.text
    assert KEY not in caplog.text + str(error.value) + str(vars(runtime))
    monkeypatch.delenv("TEST_KEY")
    with pytest.raises(RemoteError, match="environment variable TEST_KEY is not set"):
        runtime.score(windows(1))


def test_a_busy_server_is_asked_again(served: Served, reference: ReferenceRuntime) -> None:
    served.faults = [503, 429]
    found = RemoteRuntime(served.url, "gptq").score(windows(1))
    torch.testing.assert_close(found, reference.score(windows(1)), atol=1e-4, rtol=1e-4)
    served.faults = [503, 503, 503, 503]
    with pytest.raises(RemoteError, match=r"/v1/completions answered 503: .*no room for this.*tried 3 times"):
        RemoteRuntime(served.url, "gptq").score(windows(1))


def test_a_refusal_is_final(served: Served) -> None:
    served.faults = [400]
    with pytest.raises(RemoteError, match="answered 400"):
        RemoteRuntime(served.url, "gptq").score(windows(1))
    assert len(served.requests) == 1


def test_a_server_that_is_not_there() -> None:
    with pytest.raises(RemoteError, match=r"127\.0\.0\.1:9/v1/completions cannot be reached .*tried 1 times"):
        RemoteRuntime("http://127.0.0.1:9/v1", "gptq", tries=1).score(windows(1))


def test_a_server_that_hangs(served: Served) -> None:
    served.delay = threading.Event()
    with pytest.raises(RemoteError, match=r"did not answer within 0\.2 s; tried 1 times"):
        RemoteRuntime(served.url, "gptq", timeout_seconds=0.2, tries=1).score(windows(1))


def test_something_else_than_the_api(served: Served) -> None:
    with pytest.raises(RemoteError, match="answered 404"):
        RemoteRuntime(served.url.removesuffix("/v1"), "gptq").score(windows(1))
    served.raw = b"<html>"
    with pytest.raises(RemoteError, match="did not answer with JSON"):
        RemoteRuntime(served.url, "gptq").score(windows(1))
    served.raw = b"[]"
    with pytest.raises(RemoteError, match="is no list of completions"):
        RemoteRuntime(served.url, "gptq").score(windows(1))
    with pytest.raises(RemoteError, match="is no completion"):
        RemoteRuntime(served.url, "gptq").generate(windows(1), 2)


def test_damaged_numbers_are_noticed(served: Served) -> None:
    def lose(answer: dict[str, Any]) -> None:
        answer["choices"][0]["logprobs"]["token_logprobs"][4] = None

    def spoil(answer: dict[str, Any]) -> None:
        answer["choices"][0]["logprobs"]["token_logprobs"][4] = float("nan")

    served.change = lose
    with pytest.raises(RemoteError, match="lacks the log-probability of some tokens"):
        RemoteRuntime(served.url, "gptq").score(windows(2))
    served.change = spoil
    with pytest.raises(NumericalError, match="not finite"):
        RemoteRuntime(served.url, "gptq").score(windows(2))


def test_a_server_without_token_ids(served: Served) -> None:
    served.change = lambda answer: answer["choices"][0].pop("token_ids")
    with pytest.raises(RemoteError, match="gives the ids of 0 of 4 tokens"):
        RemoteRuntime(served.url, "gptq").generate(windows(1), 4)


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host/v1", "http://", "http://host/v1?key=1"])
def test_what_is_no_url(url: str) -> None:
    with pytest.raises(RemoteError, match="is no URL of a server"):
        RemoteRuntime(url, "gptq")


def test_a_url_with_a_key_is_refused_without_showing_it() -> None:
    with pytest.raises(RemoteError, match="holds a user name or key") as error:
        RemoteRuntime(f"https://me:{KEY}@host/v1", "gptq")
    assert KEY not in str(error.value)


def test_windows_that_have_no_loss(served: Served) -> None:
    with pytest.raises(DataError, match="at least 2 tokens"):
        RemoteRuntime(served.url, "gptq").score(torch.ones(1, 1, dtype=torch.int64))
    with pytest.raises(RemoteError, match="gives no logits"):
        RemoteRuntime(served.url, "gptq").logits(windows(1))


def test_llama_cpps_server(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It continues texts; and that it cannot score is said, not guessed around."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    export(built, "gguf", tmp_path / "files", experts=["gptq"])
    local = LlamaCppRuntime(tmp_path / "files" / "gptq.gguf", threads=1, context_tokens=64)
    prompt = windows(1)
    text = local.generate(prompt, 6)
    assert local._generating is not None
    monkeypatch.setenv("LLAMA_KEY", local._generating._key)
    address = local._generating._server.listening_address
    runtime = RemoteRuntime(f"{address}/v1", "gptq", key_variable="LLAMA_KEY")
    assert runtime.generate(prompt, 6) == text
    with pytest.raises(RemoteError, match="cannot be in a loss table"):
        runtime.score(prompt)
    monkeypatch.setenv("LLAMA_KEY", "another")
    with pytest.raises(RemoteError, match="answered 401"):
        runtime.generate(prompt, 6)
    local.release()
