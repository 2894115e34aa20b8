from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from moqe.data.samples import TextSamples
from moqe.errors import DataError, NumericalError
from moqe.methods.statistics import InputStatistics
from moqe.models.calibration import CalibratedBlock, Replace, Statistics, calibrate
from moqe.models.decoder import Decoder
from moqe.models.device import rounded_products
from moqe.progress import Advance

Saved = Callable[[str], Path]


def windows(n: int = 7, window: int = 20) -> TextSamples:
    """Two domains, interleaved, so that neither fills whole batches."""
    tokens = torch.randint(0, 512, (n, window), generator=torch.Generator().manual_seed(11))
    domains = tuple("prose" if i % 3 else "code" for i in range(n))
    return TextSamples(tokens, tuple(f"d{i}" for i in range(n)), domains, (window,) * n)


def copied(block: CalibratedBlock) -> dict[tuple[str, str], InputStatistics]:
    return {(key, domain): part for key, parts in block.statistics.items() for domain, part in parts.items()}


def all_statistics(
    decoder: Decoder, samples: TextSamples, start_block: int = 0
) -> dict[int, dict[tuple[str, str], InputStatistics]]:
    return {block.index: copied(block) for block in calibrate(decoder, samples, batch_size=2, start_block=start_block)}


def assert_identical(a: dict[tuple[str, str], InputStatistics], b: dict[tuple[str, str], InputStatistics]) -> None:
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key].hessian, b[key].hessian)
        assert torch.equal(a[key].absmax, b[key].absmax)
        assert torch.equal(a[key].abssum, b[key].abssum)
        assert a[key].tokens == b[key].tokens


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "mistral"])
def test_statistics_are_those_of_a_plain_forward(saved: Saved, architecture: str) -> None:
    decoder, samples = Decoder.open(str(saved(architecture))), windows()
    model = decoder.full()
    seen: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _m, args, name=name: seen.__setitem__(name, args[0]))
    with torch.no_grad():
        model(samples.tokens)
    for block in calibrate(decoder, samples, batch_size=2):
        assert {name for group in block.groups for name in group.names} == {
            name for name, module in block.module.named_modules() if isinstance(module, nn.Linear)
        }
        for group in block.groups:
            for domain in ("code", "prose"):
                rows = [i for i, other in enumerate(samples.domain) if other == domain]
                x = seen[f"{block.name}.{group.names[-1]}"][rows].flatten(0, 1)
                part = block.statistics[group.key][domain]
                torch.testing.assert_close(part.hessian, x.T @ x, rtol=1e-4, atol=1e-3)
                torch.testing.assert_close(part.absmax, x.abs().amax(0), rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(part.abssum, x.abs().sum(0), rtol=1e-4, atol=1e-4)
                assert part.tokens == len(rows) * 20


def test_resumed_is_undisturbed_bit_for_bit(saved: Saved) -> None:
    samples = windows()
    whole = all_statistics(Decoder.open(str(saved("qwen3"))), samples)
    resumed = all_statistics(Decoder.open(str(saved("qwen3"))), samples, start_block=1)
    assert list(whole) == [0, 1]
    assert list(resumed) == [1]
    assert_identical(whole[1], resumed[1])


def test_nothing_left_to_do_yields_nothing(saved: Saved) -> None:
    assert all_statistics(Decoder.open(str(saved("qwen3"))), windows(), start_block=2) == {}


def test_one_block_at_a_time(saved: Saved) -> None:
    decoder = Decoder.open(str(saved("llama")))
    for block in calibrate(decoder, windows()):
        real = [name for name, p in decoder.model.named_parameters() if not p.is_meta]
        assert all(name.startswith((block.name, "model.norm")) for name in real)
    assert [name for name, p in decoder.model.named_parameters() if not p.is_meta] == ["model.norm.weight"]


def test_abandoned_pass_releases_its_block(saved: Saved) -> None:
    decoder = Decoder.open(str(saved("llama")))
    blocks = calibrate(decoder, windows())
    next(blocks)
    blocks.close()
    assert all(p.is_meta for p in decoder._blocks.parameters())


def test_changing_a_yielded_block_does_not_reach_the_next(saved: Saved) -> None:
    decoder, samples = Decoder.open(str(saved("llama"))), windows()
    undisturbed = all_statistics(decoder, samples)[1]
    for block in calibrate(decoder, samples, batch_size=2):
        if block.index == 1:
            assert_identical(copied(block), undisturbed)
        with torch.no_grad():
            block.module.get_parameter("mlp.down_proj.weight").zero_()


@contextmanager
def halve(index: int, block: nn.Module) -> Iterator[None]:
    with torch.no_grad():
        block.get_parameter("mlp.down_proj.weight").mul_(0.5)
    yield


def test_replaced_blocks_make_the_next_inputs(saved: Saved, tmp_path: Path) -> None:
    samples, decoder = windows(), Decoder.open(str(saved("llama")))
    model = decoder.full()
    with halve(0, model.get_submodule("model.layers.0")):
        model.save_pretrained(tmp_path)  # type: ignore[operator]
    expected = all_statistics(Decoder.open(str(tmp_path)), samples)[1]
    untouched = all_statistics(decoder, samples)[0]
    for start in (0, 1):
        blocks = {
            block.index: copied(block)
            for block in calibrate(decoder, samples, batch_size=2, start_block=start, replace=halve)
        }
        assert_identical(blocks[1], expected)
        if start == 0:
            assert_identical(blocks[0], untouched)


class Counting:
    """Remembers what was announced and what was done."""

    def __init__(self) -> None:
        self.total = self.done = 0

    @contextmanager
    def track(self, what: str, total: int) -> Iterator[Advance]:
        def advance(steps: int) -> None:
            self.done += steps

        self.total = total
        yield advance


@pytest.mark.parametrize(("start", "replace"), [(0, None), (1, None), (0, halve), (1, halve)])
def test_progress_ends_at_its_total(saved: Saved, start: int, replace: Replace | None) -> None:
    progress = Counting()
    decoder = Decoder.open(str(saved("llama")))
    for _ in calibrate(decoder, windows(), start_block=start, replace=replace, progress=progress):
        pass
    assert progress.total == progress.done > 0


def test_no_windows(saved: Saved) -> None:
    with pytest.raises(DataError, match="no calibration windows"):
        next(calibrate(Decoder.open(str(saved("llama"))), windows(0)))


def test_overflowing_activations_name_the_block(saved: Saved, tmp_path: Path) -> None:
    model = Decoder.open(str(saved("llama"))).full()
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.down_proj.weight").fill_(3e38)
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    with pytest.raises(NumericalError, match=r"after model\.layers\.1 are not finite"):
        list(calibrate(Decoder.open(str(tmp_path)), windows()))


def test_windows_of_one_domain_only(saved: Saved) -> None:
    samples = windows().select([1, 2, 4])
    statistics: Statistics = next(calibrate(Decoder.open(str(saved("llama"))), samples)).statistics
    assert [list(parts) for parts in statistics.values()] == [["prose"]] * 4


def precision() -> str:
    """The process's setting for float32 products."""
    found: str = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
    return found


def test_rounded_products_round_inputs_and_nothing_else(saved: Saved) -> None:
    decoder, samples = Decoder.open(str(saved("llama"))), windows()
    exact = all_statistics(decoder, samples)
    setting = precision()
    for block in calibrate(decoder, samples, batch_size=2, products=torch.bfloat16):
        assert precision() == setting
        for key, part in copied(block).items():
            reference = exact[block.index][key]
            difference = (part.hessian - reference.hessian).norm() / reference.hessian.norm()
            assert float(difference) < 2**-6
            assert torch.equal(part.hessian, part.hessian.T)
            assert part.hessian.dtype == torch.float32
            assert part.tokens == reference.tokens


def test_the_setting_of_products_survives_an_error() -> None:
    def fail() -> None:
        with rounded_products(torch.bfloat16, torch.device("cpu")):
            assert precision() == "bf16"
            raise NumericalError("x")

    before = precision()
    with pytest.raises(NumericalError):
        fail()
    assert precision() == before
    with rounded_products(torch.float32, torch.device("cpu")):
        assert precision() == before
