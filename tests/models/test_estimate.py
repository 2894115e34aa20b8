from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config

from moqe.expert_options import Specialists
from moqe.method_options import Distill
from moqe.methods.distill import distill_seconds
from moqe.methods.distill.cost import training_steps
from moqe.methods.rtn import Rtn
from moqe.models.decoder import Decoder
from moqe.models.estimate import (
    FLOAT32,
    Shape,
    Workload,
    calibration_bytes,
    calibration_flops,
    estimate,
    expert_block_bytes,
    measure_flops,
    measure_shape,
    scale_block_bytes,
    scoring_bytes,
)
from moqe.recipe import Expert
from moqe.schemes import SCHEMES, Scheme

Saved = Callable[[str], Path]
WORK = Workload(window=32, calibration_windows=4, domains=2, scored_windows=10)


@pytest.fixture(scope="module")
def shape(saved: Saved) -> Shape:
    return measure_shape(Decoder.dry(str(saved("qwen3"))))


def experts(*pairs: tuple[str, str]) -> tuple[tuple[Expert, ...], dict[str, Scheme]]:
    made = tuple(Expert(name=f"{method}-{name}", method=method, scheme=name) for method, name in pairs)
    return made, {expert.name: SCHEMES[expert.scheme] for expert in made}


def test_shape_is_the_models(saved: Saved, shape: Shape) -> None:
    model = Decoder.open(str(saved("qwen3"))).full()
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert [len(names) for _, names in shape.groups] == [3, 1, 2, 1]
    assert [columns for columns, _ in shape.groups] == [256, 128, 256, 512]
    assert shape.linears["mlp.down_proj"] == (256, 512)
    assert (shape.blocks, shape.hidden, shape.vocabulary, shape.stored_bytes) == (2, 256, 512, 4)


def test_large_model_needs_neither_weights_nor_memory(tmp_path: Path) -> None:
    Qwen3Config(
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151936,
        tie_word_embeddings=True,
        dtype="bfloat16",
    ).save_pretrained(tmp_path)
    shape = measure_shape(Decoder.dry(str(tmp_path)))
    assert shape.parameters == 596_049_920  # Qwen3-0.6B
    assert shape.stored_bytes == 2


def test_disk_follows_bits_and_shares_what_is_shared(shape: Shape) -> None:
    made, schemes = experts(("rtn", "w4a16"), ("rtn", "w8a16"))
    prediction = estimate(shape, made, schemes, {"rtn": Rtn()}, WORK, 1e12)
    blocks = [expert_block_bytes(shape, schemes[expert.name]) for expert in made]
    outside = shape.other_parameters * 4
    assert prediction.disk_bytes == sum(blocks) + outside
    assert list(prediction.expert_bytes.values()) == [size + outside for size in blocks]
    assert blocks[1] > 1.8 * blocks[0]


def test_a_second_file_family_stores_the_shared_part_again(shape: Shape) -> None:
    made, schemes = experts(("rtn", "w4a16"), ("rtn", "w8a16"))
    integers = estimate(shape, made, schemes, {"rtn": Rtn()}, WORK, 1e12)
    both = estimate(shape, made, {**schemes, made[1].name: SCHEMES["q8_0"]}, {"rtn": _Free()}, WORK, 1e12)
    difference = expert_block_bytes(shape, SCHEMES["q8_0"]) - expert_block_bytes(shape, SCHEMES["w8a16"])
    assert both.disk_bytes - integers.disk_bytes == difference + shape.other_parameters * 4
    assert both.work_bytes == expert_block_bytes(shape, SCHEMES["q8_0"])
    assert integers.work_bytes == 0


class _Free(Rtn):
    """A method that costs nothing."""

    def quantize(self, *_: object) -> None:  # type: ignore[override]
        return None


def test_existing_checkpoints_are_only_scored(shape: Shape) -> None:
    theirs = Expert(name="theirs", checkpoint="somewhere")
    made, schemes = experts(("rtn", "w4a16"))
    alone = estimate(shape, made, schemes, {"rtn": _Free()}, WORK, 1e9)
    both = estimate(shape, (*made, theirs), schemes, {"rtn": _Free()}, WORK, 1e9)
    assert both.disk_bytes == alone.disk_bytes
    assert both.seconds["score"] == pytest.approx(1.5 * alone.seconds["score"])  # base and 1, base and 2
    assert both.seconds["calibrate"] == alone.seconds["calibrate"]


def test_sequential_experts_have_passes_of_their_own(shape: Shape) -> None:
    made, schemes = experts(("rtn", "w4a16"), ("rtn", "w8a16"))
    together = estimate(shape, made, schemes, {"rtn": _Free()}, WORK, 1e9)
    changed = (made[0], made[1].model_copy(update={"sequential": True}))
    apart = estimate(shape, changed, schemes, {"rtn": _Free()}, WORK, 1e9)
    assert apart.seconds["calibrate"] == pytest.approx(3 * together.seconds["calibrate"])
    assert apart.work_bytes == shape.blocks * shape.block_parameters * FLOAT32


def test_dense_algebra_counts_for_gptq_only(shape: Shape) -> None:
    made, schemes = experts(("rtn", "w4a16"), ("gptq", "w4a16"))
    methods = {"rtn": _Free(), "gptq": _Free()}
    rtn = estimate(shape, made[:1], schemes, methods, WORK, 1e6)
    gptq = estimate(shape, made[1:], schemes, methods, WORK, 1e6)
    assert gptq.seconds["quantize"] > rtn.seconds["quantize"] + 1


def test_more_of_anything_costs_more(shape: Shape) -> None:
    for more in (replace(WORK, window=64), replace(WORK, calibration_windows=8)):
        assert calibration_flops(shape, more) > calibration_flops(shape, WORK)
        assert calibration_bytes(shape, more) > calibration_bytes(shape, WORK)
    assert calibration_bytes(shape, replace(WORK, domains=3)) > calibration_bytes(shape, WORK)
    made, schemes = experts(("rtn", "w4a16"))
    prediction = estimate(shape, made, schemes, {"rtn": Rtn()}, WORK, 1e12)
    assert prediction.ram_bytes > scoring_bytes(shape)
    assert prediction.total_seconds == sum(prediction.seconds.values()) > 0


def test_rate_is_positive() -> None:
    assert measure_flops() > 1e8
    assert torch.get_num_threads() == 1


def test_an_expert_with_another_s_codes_takes_its_scales(shape: Shape) -> None:
    (owner,), schemes = experts(("rtn", "w4a16"))
    other = owner.model_copy(update={"name": "other", "codes_of": owner.name})
    schemes["other"] = schemes[owner.name]
    alone = estimate(shape, (owner,), schemes, {"rtn": _Free()}, WORK, 1e9)
    both = estimate(shape, (owner, other), schemes, {"rtn": _Free()}, WORK, 1e9)
    added = both.disk_bytes - alone.disk_bytes
    assert added == scale_block_bytes(shape, schemes["other"])
    assert 0 < added < 0.1 * expert_block_bytes(shape, schemes["other"])
    assert both.expert_bytes["other"] == alone.expert_bytes[owner.name]  # as if it stood alone


def test_branches_candidates_and_rounds_are_counted() -> None:
    found = Specialists(rounds=2, distill=Distill(steps=10, branch_after=4), own_weight=None)
    generalist, first, second = found.experts(("a", "b"))
    assert training_steps(generalist, found) == 10
    assert training_steps(first, found) == training_steps(second, found) == 3 * 3 * 6
    assert training_steps(Expert(name="plain", method="rtn", scheme="w4a16"), found) == 0


def test_distillation_takes_longer_with_more_of_anything() -> None:
    def seconds(steps: int, windows: int = 8) -> float:
        expert = Expert(name="e", method="rtn", scheme="w4a16", distill=Distill(steps=steps, validation_windows=1))
        return distill_seconds(
            [expert],
            None,
            linear_weights=10**8,
            head_weights=10**6,
            window=16,
            windows=windows,
            dtype=torch.float32,
            device="cpu",
            flops_per_second=1e10,
        )

    assert seconds(200) > 2 * seconds(20)
    assert seconds(20, windows=10_000) > seconds(20) + 1000


def test_a_faster_precision_shortens_calibration_alone(shape: Shape) -> None:
    made, schemes = experts(("rtn", "w4a16"))
    plain = estimate(shape, made, schemes, {"rtn": _Free()}, WORK, 1e9)
    fast = estimate(shape, made, schemes, {"rtn": _Free()}, WORK, 1e9, 4e9)
    assert fast.seconds["calibrate"] == pytest.approx(plain.seconds["calibrate"] / 4)
    assert fast.seconds["score"] == plain.seconds["score"]


def test_wide_scales_take_their_bytes(shape: Shape) -> None:
    narrow, wide = SCHEMES["w4a16"], replace(SCHEMES["w4a16"], scale_bits=32)
    scales = shape.blocks * sum(out * columns // 128 for out, columns in shape.linears.values())
    assert expert_block_bytes(shape, wide) - expert_block_bytes(shape, narrow) == 2 * scales
    assert scale_block_bytes(shape, wide) - scale_block_bytes(shape, narrow) == 2 * scales
