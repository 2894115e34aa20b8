"""Planted data: the tokens of a sample tell which expert is best on it, by `signal` nats."""

from collections.abc import Callable

import pytest
import torch

from moqe.router import RoutingExamples, TokenFeatures

VOCABULARY, DIMENSION, TOKENS, PER_DOCUMENT = 90, 16, 12, 4


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def planted() -> Callable[..., RoutingExamples]:
    def make(n: int, signal: float, seed: int, experts: int = 3, noise: float = 0.03) -> RoutingExamples:
        generator = torch.Generator().manual_seed(seed)
        fixed = torch.Generator().manual_seed(12345)
        embedding = torch.randn(VOCABULARY, DIMENSION, generator=fixed)
        embedding += torch.randn(experts, DIMENSION, generator=fixed).repeat_interleave(VOCABULARY // experts, 0)
        documents = -(-n // PER_DOCUMENT)
        best = torch.randint(0, experts, (documents,), generator=generator).repeat_interleave(PER_DOCUMENT)[:n]
        block = VOCABULARY // experts
        typical = best[:, None] * block + torch.randint(0, block, (n, TOKENS), generator=generator)
        common = torch.randint(0, VOCABULARY, (n, TOKENS), generator=generator)
        tokens = torch.where(torch.rand(n, TOKENS, generator=generator) < 0.7, typical, common)
        losses = (
            3.0 + 0.5 * torch.randn(n, 1, generator=generator) + noise * torch.randn(n, experts, generator=generator)
        )
        losses[torch.arange(n), best] -= signal
        return RoutingExamples(
            TokenFeatures(tokens, embedding), losses, tuple(f"document-{i // PER_DOCUMENT}-{seed}" for i in range(n))
        )

    return make
