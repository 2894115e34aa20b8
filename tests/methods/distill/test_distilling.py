"""Distillation on a tiny base: it helps, resumes to the same bits, branches fairly, and shows windows as asked."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moqe.errors import DataError, NumericalError
from moqe.folder import MixtureFolder
from moqe.formats import open_expert
from moqe.method_options import Distill
from moqe.methods import check
from moqe.methods.distill import Distilled, Student, Targets, TrainingSet, distill, snapshot_path
from moqe.methods.distill.targets import BaseAnswers
from moqe.methods.distill.training import rate_share, window_schedule
from moqe.models.decoder import Decoder
from moqe.models.shared import open_shared
from moqe.progress import Silent
from moqe.recipe import parse_recipe
from moqe.tasks.expert_maker import ExpertMaker
from moqe.tasks.language import LanguageTask

LABELS = ("code", "numbers", "prose")
OPTIONS = Distill(steps=12, learning_rate=0.01, evaluate_every=6)


@pytest.fixture(scope="module")
def material(loud_base: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A maker of students, and a training set, for a 3-bit expert of the tiny base."""
    from tests.conftest import recipe_for

    content = recipe_for(loud_base, texts)
    content["experts"] = [{"name": "rtn", "method": "rtn", "scheme": "w3a16", "group_size": 64}]
    recipe = parse_recipe(content)
    folder = MixtureFolder(tmp_path_factory.mktemp("distill"))
    decoder = Decoder.open(recipe.base)
    samples = LanguageTask(recipe, folder.path).splits()["calibration"]
    schemes = {expert.name: check(expert) for expert in recipe.experts}
    ExpertMaker(recipe, schemes, decoder, folder).run(samples, Silent())
    skeleton = open_shared(folder.shared, folder.shared / "model-shared.safetensors").model
    targets = Targets.of(decoder, samples.tokens)
    data = TrainingSet(samples.tokens, samples.domain, targets, torch.arange(9), torch.arange(9, 12))

    def student(**options: Any) -> Student:
        return Student(skeleton, open_expert(folder.expert("rtn")), **options)

    return student, data


def same(one: Distilled, other: Distilled) -> bool:
    """Whether two trainings ended alike, to the bit."""
    assert one.state.keys() == other.state.keys()
    return all(torch.equal(value, other.state[name]) for name, value in one.state.items())


def test_targets_are_what_the_whole_model_says_before_its_head(loud_base: Path, material: Any) -> None:
    _, data = material
    model = Decoder.open(str(loud_base)).full()
    with torch.no_grad():
        whole = model.base_model(input_ids=data.tokens[:, :-1]).last_hidden_state  # type: ignore[operator]
    torch.testing.assert_close(data.targets.hidden, whole, rtol=1e-4, atol=1e-4)


def test_the_base_is_run_when_asked_and_over_the_windows_that_will_be_shown(loud_base: Path, material: Any) -> None:
    student, data = material
    ran: list[str] = []

    class Shown(Silent):
        def track(self, what: str, total: int) -> Any:
            ran.append(what)
            return super().track(what, total)

    rows = torch.tensor([1, 4, 7])
    later = Targets.later(Decoder.open(str(loud_base)), data.tokens, progress=Shown(), rows=rows)
    assert not ran
    mixed = replace(later, text_weight=0.5)
    torch.testing.assert_close(later.hidden[rows], data.targets.hidden[rows], rtol=1e-4, atol=1e-4)
    assert mixed.hidden is later.hidden
    assert ran == ["distill: run the base"]
    others = torch.ones(len(data.tokens), dtype=torch.bool).index_fill_(0, rows, False)
    assert later.hidden[others].isnan().all()
    assert later.divergence(student(), data.tokens, rows).isfinite().all()


def test_divergence_is_that_of_the_logits(material: Any) -> None:
    student, data = material
    made, rows = student(), torch.tensor([1, 4])
    with torch.no_grad():
        ours = made.head(made.hidden(data.tokens[rows][:, :-1])).log_softmax(-1)
        theirs = made.head(data.targets.hidden[rows]).log_softmax(-1)
    wanted = torch.nn.functional.kl_div(ours, theirs, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(data.targets.divergence(made, data.tokens, rows), wanted.mean(1), rtol=1e-4, atol=1e-5)
    halves = data.targets.halves(made, data.tokens, rows)
    torch.testing.assert_close(halves[:, 0], wanted[:, :24].mean(1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(halves[:, 1], wanted[:, 24:].mean(1), rtol=1e-4, atol=1e-5)


def test_text_takes_its_share_of_the_target(material: Any) -> None:
    student, data = material
    made, rows, weight = student(), torch.tensor([2, 7]), 0.3
    with torch.no_grad():
        ours = made.head(made.hidden(data.tokens[rows][:, :-1])).log_softmax(-1)
        theirs = made.head(data.targets.hidden[rows]).softmax(-1)
    text = torch.nn.functional.one_hot(data.tokens[rows][:, 1:], theirs.shape[-1])
    wanted = (1 - weight) * theirs + weight * text
    expected = torch.nn.functional.kl_div(ours, wanted, reduction="none").sum(-1).mean(1)
    mixed = replace(data.targets, text_weight=weight)
    torch.testing.assert_close(mixed.divergence(made, data.tokens, rows), expected, rtol=1e-4, atol=1e-5)


def test_the_gradient_of_a_mixed_target_is_the_mix_of_gradients(material: Any) -> None:
    student, data = material
    rows, weight, gradients = torch.tensor([2, 7]), 0.3, []
    for target in (data.targets, replace(data.targets, text_weight=weight)):
        made = student()
        target.backward(made, data.tokens, rows)
        gradients.append({name: p.grad for name, p in made.parameters().items()})
    made = student()
    found = made.head(made.hidden(data.tokens[rows][:, :-1])).flatten(0, 1)
    torch.nn.functional.cross_entropy(found, data.tokens[rows][:, 1:].flatten()).backward()
    for name, parameter in made.parameters().items():
        mixed = (1 - weight) * gradients[0][name] + weight * parameter.grad
        torch.testing.assert_close(gradients[1][name], mixed, rtol=1e-3, atol=1e-5)


def test_training_on_text_lowers_its_loss_further(material: Any, tmp_path: Path) -> None:
    student, data = material
    losses = []
    for weight in (0.0, 0.9):
        made, targets = student(), replace(data.targets, text_weight=weight)
        learnt = TrainingSet(data.tokens, data.label, targets, data.train, data.train)
        result = distill(made, learnt, OPTIONS, 0, tmp_path / str(weight))
        made.load_state(result.state)
        text = replace(data.targets, text_weight=0.999)
        losses.append(float(text.divergence(made, data.tokens, data.train).mean()))
    assert losses[1] < losses[0] - 0.01


def test_pieces_of_the_logits_give_the_gradient_of_the_whole(material: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    student, data = material
    gradients = []
    for elements in (1 << 24, 320 * 5):  # everything at once, and five positions at a time
        monkeypatch.setattr("moqe.methods.distill.targets._LOGIT_ELEMENTS", elements)
        made = student()
        loss = data.targets.backward(made, data.tokens, torch.tensor([0, 5]))
        gradients.append([loss, *(p.grad for p in made.parameters().values())])
    assert gradients[0][0] == pytest.approx(gradients[1][0], rel=1e-5)
    for one, other in zip(gradients[0][1:], gradients[1][1:], strict=True):
        assert one.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_is_that_of_autograd(material: Any, dtype: torch.dtype) -> None:
    student, data = material
    made, rows = student(), torch.tensor([1, 4])
    targets = replace(data.targets, dtype=dtype, text_weight=0.3)
    value = targets.backward(made, data.tokens, rows)
    ours = {name: parameter.grad for name, parameter in made.parameters().items()}
    for parameter in made.parameters().values():
        parameter.grad = None
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        hidden = made.hidden(data.tokens[rows][:, :-1]).flatten(0, 1)
        theirs, following = data.targets.hidden[rows].flatten(0, 1), data.tokens[rows][:, 1:].flatten()
        loss = targets._kl(made, hidden, theirs, following).mean()
    loss.backward()  # type: ignore[no-untyped-call]
    assert value == pytest.approx(float(loss.detach()), rel=1e-5)
    for name, parameter in made.parameters().items():
        assert parameter.grad is not None
        error = (ours[name] - parameter.grad).norm() / parameter.grad.norm()
        assert float(error) < (1e-5 if dtype == torch.float32 else 0.02), name


def test_keeping_activations_or_making_them_again_is_the_same(material: Any) -> None:
    student, data = material
    found, ran = [], []
    for most in (0, 1 << 40):
        made, calls = student(most_kept=most), Counter[str]()
        block = next(module for name, module in made.model.named_modules() if name.endswith("layers.0"))
        block.block.register_forward_pre_hook(lambda *_, calls=calls: calls.update(["forward"]))
        for _ in range(2):
            data.targets.backward(made, data.tokens, torch.tensor([1, 4]))
        found.append({name: parameter.grad for name, parameter in made.parameters().items()})
        ran.append(calls["forward"])
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())
    assert ran == [5, 3]  # one to decide; then forward and again, or forward only


def test_training_lowers_the_divergence_and_stores_what_it_reached(material: Any, tmp_path: Path) -> None:
    student, data = material
    made = student()
    result = distill(made, data, OPTIONS, 0, tmp_path)
    assert result.divergence[12] < 0.95 * result.divergence[0]
    assert result.step in (6, 12)
    made.load_state(result.state)
    reached = float(data.targets.divergence(made, data.tokens, data.validation).mean())
    assert reached == pytest.approx(result.divergence[result.step], rel=1e-5)


def test_the_best_state_is_kept_when_later_ones_are_worse(material: Any, tmp_path: Path) -> None:
    student, data = material
    result = distill(student(), data, Distill(steps=6, learning_rate=3.0, evaluate_every=3), 0, tmp_path)
    assert result.step == 0
    assert result.divergence[6] > result.divergence[0]
    assert all(not value.any() for value in result.state.values())


def test_an_interrupted_training_ends_in_the_same_bits(
    material: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, data = material
    monkeypatch.setattr("moqe.methods.distill.training._SAVED_EVERY", 4)
    whole = distill(student(), data, OPTIONS, 0, tmp_path / "whole")
    calls = 0
    backward = Targets.backward

    def dies(self: Targets, *args: Any) -> float:
        nonlocal calls
        calls += 1
        if calls == 7:
            raise KeyboardInterrupt
        return backward(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Targets, "backward", dies)
        with pytest.raises(KeyboardInterrupt):
            distill(student(), data, OPTIONS, 0, tmp_path / "killed")
    assert (tmp_path / "killed" / "training.safetensors").exists()
    resumed = distill(student(), data, OPTIONS, 0, tmp_path / "killed")
    assert same(whole, resumed)
    assert whole.divergence == resumed.divergence


def test_a_branch_with_equal_weights_is_its_trunk(material: Any, tmp_path: Path) -> None:
    student, data = material
    trunk = distill(student(), data, OPTIONS, 0, tmp_path / "trunk", snapshots=frozenset({6}))
    start = snapshot_path(tmp_path / "trunk", 6)
    alike = distill(student(), data, OPTIONS, 0, tmp_path / "alike", start=start)
    assert same(trunk, alike)
    weighed = Distill(**{**OPTIONS.model_dump(), "weights": {"code": 50.0}})
    other = distill(student(), data, weighed, 0, tmp_path / "other", start=start)
    assert not same(trunk, other)
    assert set(other.divergence) == {6, 12}


def test_a_training_killed_at_its_snapshot_still_has_it(
    material: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Snapshot and checkpoint fall on one step; whichever of them is written last does not get written."""
    from moqe.methods.distill import training

    student, data = material
    monkeypatch.setattr(training, "_SAVED_EVERY", 6)
    save, saved = training.save_tensors, list[Path]()

    def dies(path: Path, tensors: Any) -> None:
        saved.append(path)
        if len(saved) == 2:
            raise KeyboardInterrupt
        save(path, tensors)

    with monkeypatch.context() as patch:
        patch.setattr(training, "save_tensors", dies)
        with pytest.raises(KeyboardInterrupt):
            distill(student(), data, OPTIONS, 0, tmp_path, snapshots=frozenset({6}))
    distill(student(), data, OPTIONS, 0, tmp_path, snapshots=frozenset({6}))
    assert snapshot_path(tmp_path, 6).exists()


def test_norms_are_trained_only_where_asked(material: Any, tmp_path: Path) -> None:
    student, data = material
    assert not student().norms
    made = student(norms=True)
    before = {name: value.detach().clone() for name, value in made.norms.items()}
    distill(made, data, Distill(steps=3, norms=True, learning_rate=0.2), 0, tmp_path)
    assert before
    assert all(not torch.equal(value, made.norms[name]) for name, value in before.items())
    stored = made.tensors()
    name = next(iter(before))
    assert not torch.equal(stored[name], made.files.load(name))
    made.load_state({})
    assert torch.equal(made.norms[name].detach(), before[name])


def test_a_student_stores_what_it_computes(material: Any, tmp_path: Path) -> None:
    student, data = material
    made = student()
    distill(made, data, OPTIONS, 0, tmp_path)
    for name, value in made.tensors().items():
        if name in made.linears:
            scale = made.linears[name].current()[0].to(torch.bfloat16).float()
            wanted = (made.linears[name].step.float() * scale[..., None]).flatten(1).detach()
            assert torch.equal(value.dequantize(), wanted)  # type: ignore[union-attr]


def test_what_cannot_be_trained_is_refused(material: Any, tmp_path: Path) -> None:
    student, data = material
    nothing = TrainingSet(data.tokens, data.label, data.targets, data.train, data.validation[:0])
    with pytest.raises(DataError, match="validate"):
        distill(student(), nothing, OPTIONS, 0, tmp_path)
    silent = Distill(steps=2, weights=dict.fromkeys(LABELS, 0.0))
    with pytest.raises(DataError, match="every domain's weight is 0"):
        distill(student(), data, silent, 0, tmp_path)
    broken = TrainingSet(
        data.tokens,
        data.label,
        replace(data.targets, answers=BaseAnswers(lambda: data.targets.hidden * float("nan"))),
        data.train,
        data.validation,
    )
    with pytest.raises(NumericalError, match="learning_rate"):
        distill(student(), broken, OPTIONS, 0, tmp_path / "nan")


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.sampled_from(LABELS), min_size=1, max_size=20),
    st.dictionaries(st.sampled_from(LABELS), st.floats(0.1, 20.0)),
    st.integers(1, 120),
    st.integers(0, 5),
)
def test_every_label_gets_its_turns(label: list[str], weights: dict[str, float], length: int, seed: int) -> None:
    schedule = window_schedule(label, torch.arange(len(label)), weights, length, seed)
    shares = Counter(label)
    total = sum(shares[name] * weights.get(name, 1.0) for name in shares)
    for turns in (length // 2, length):
        seen = Counter(label[row] for row in schedule[:turns].tolist())
        for name in shares:
            assert abs(seen[name] - turns * shares[name] * weights.get(name, 1.0) / total) < len(shares)
    for name in shares:  # no window is seen twice before all of its label were seen once
        rows = [row for row in schedule.tolist() if label[row] == name]
        assert len(set(rows[: shares[name]])) == min(len(rows), shares[name])


def test_the_rate_warms_up_and_falls_to_zero() -> None:
    rates = [rate_share(step, 100) for step in range(100)]
    assert rates[:5] == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert rates[5] == 1.0
    assert all(one >= other for one, other in pairwise(rates[5:]))
    assert rates[-1] < 0.001
    assert rate_share(0, 1) == 1.0
