from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from moqe.data.classification import CLASS_METRICS, score_classes
from moqe.data.protocols import Scored, SplitSamples, protocol_digest
from moqe.errors import CheckpointError, NumericalError, ProtocolError
from moqe.evaluate import LossTableFile, read_losses, read_predictions

CLASSES = 7
SIZES = {"router_validation": 5, "test": 9}
LABELS = {name: torch.arange(n) % CLASSES for name, n in SIZES.items()}


def split(name: str, labelled: bool = True) -> SplitSamples:
    n = SIZES[name]
    return SplitSamples(
        tuple(f"{name}-{i}" for i in range(n)),
        tuple(f"class {i % CLASSES}" for i in range(n)),
        f"digest of {name}",
        {"whole": np.zeros(n, np.int64)},
        {"whole": protocol_digest("whole", 1)},
        LABELS[name].numpy() if labelled else None,
    )


def logits(expert: str, name: str, classes: int = CLASSES) -> torch.Tensor:
    return torch.randn(SIZES[name], classes, generator=torch.Generator().manual_seed(len(expert + name)))


def table_file(folder: Path, labelled: bool = True) -> LossTableFile:
    splits = {name: split(name, labelled) for name in SIZES}
    return LossTableFile(folder / "parts", ("base", "ptq", "brecq"), splits, CLASS_METRICS, "onnx", 4)


def score(file: LossTableFile, stop_after: int = 1000) -> int:
    written = 0
    for expert in file.experts:
        for name in file.splits:
            for chunk in file.pending(expert, name):
                if written == stop_after:
                    return written
                rows = list(chunk.rows)
                file.add(chunk, score_classes(logits(expert, name)[rows], LABELS[name][rows]))
                written += 1
    return written


@pytest.fixture
def merged(tmp_path: Path) -> Path:
    file = table_file(tmp_path)
    score(file)
    file.merge(tmp_path / "losses.parquet", tmp_path / "predictions.parquet")
    return tmp_path


def test_what_is_written_is_what_is_read(merged: Path) -> None:
    found = read_predictions(merged / "predictions.parquet", "test")
    assert found is not None
    assert found.experts == ("ptq", "brecq")
    assert found.label.tolist() == LABELS["test"].tolist()
    assert found.log_probabilities.shape == (9, 2, CLASSES)
    for column, expert in ((found.base, "base"), (found.log_probabilities[:, 1], "brecq")):
        expected = logits(expert, "test").double().log_softmax(1).numpy().astype(np.float16)
        assert np.array_equal(column, expected)
    assert np.allclose(found.probabilities.sum(2), 1, atol=2e-3)


def test_every_metric_is_a_table_of_its_own(merged: Path) -> None:
    predictions = read_predictions(merged / "predictions.parquet", "test")
    assert predictions is not None
    top1, entropy = (
        read_losses(merged / "losses.parquet", "test", "whole", name) for name in ("top1", "cross_entropy")
    )
    assert (top1.metric, top1.count.tolist()) == ("top1", [1.0] * 9)
    right = predictions.log_probabilities.argmax(2) == predictions.label[:, None]
    assert np.array_equal(top1.loss, right.astype(float))
    own = np.take_along_axis(predictions.log_probabilities, predictions.label[:, None, None], 2)[:, :, 0]
    assert np.allclose(entropy.loss, -own, rtol=1e-3)
    with pytest.raises(ProtocolError, match="did you mean 'top5'"):
        read_losses(merged / "losses.parquet", "test", "whole", "top-5")


def test_rows_and_experts_can_be_taken_out(merged: Path) -> None:
    found = read_predictions(merged / "predictions.parquet", "test")
    assert found is not None
    part = found.of(["brecq"]).select(np.array([7, 2]))
    assert (part.experts, len(part)) == (("brecq",), 2)
    assert np.array_equal(part.log_probabilities[0, 0], found.log_probabilities[7, 1])
    assert np.array_equal(part.base, found.base[[7, 2]])
    with pytest.raises(ValueError, match="not in tuple"):
        found.of(["qat"])


def test_scoring_resumes_and_ends_in_the_same_bytes(merged: Path, tmp_path: Path) -> None:
    resumed = tmp_path / "resumed"
    total = 3 * (2 + 3)
    assert score(table_file(resumed), stop_after=7) == 7
    assert score(table_file(resumed)) == total - 7
    table_file(resumed).merge(resumed / "losses.parquet", resumed / "predictions.parquet")
    for name in ("losses.parquet", "predictions.parquet"):
        assert (resumed / name).read_bytes() == (merged / name).read_bytes()


def test_rows_are_ordered_by_split_expert_and_sample(merged: Path) -> None:
    rows = pq.read_table(merged / "predictions.parquet")
    keys = list(zip(*(rows[name].to_pylist() for name in ("split", "expert", "sample")), strict=True))
    assert keys == [
        (name, expert, i) for name in SIZES for expert in ("base", "ptq", "brecq") for i in range(SIZES[name])
    ]


def test_there_is_no_file_where_samples_have_no_class(tmp_path: Path) -> None:
    file = table_file(tmp_path, labelled=False)
    for expert in file.experts:
        for name in file.splits:
            for chunk in file.pending(expert, name):
                rows = list(chunk.rows)
                file.add(chunk, Scored(score_classes(logits(expert, name)[rows], LABELS[name][rows]).losses))
    file.merge(tmp_path / "losses.parquet", tmp_path / "predictions.parquet")
    assert read_predictions(tmp_path / "predictions.parquet", "test") is None


def test_predictions_and_labels_come_together(tmp_path: Path) -> None:
    found = score_classes(logits("ptq", "test")[:4], LABELS["test"][:4])
    file = table_file(tmp_path)
    with pytest.raises(ProtocolError, match="without predictions"):
        file.add(next(file.pending("ptq", "test")), Scored(found.losses))
    unlabelled = table_file(tmp_path, labelled=False)
    with pytest.raises(ProtocolError, match="without labels"):
        unlabelled.add(next(unlabelled.pending("ptq", "test")), found)
    with pytest.raises(ProtocolError, match="metrics"):
        file.add(next(file.pending("ptq", "test")), Scored({"whole": {"top1": found.losses["whole"]["top1"]}}))
    assert not list(tmp_path.rglob("*.parquet"))


def test_predictions_must_fit_and_be_finite(tmp_path: Path) -> None:
    file = table_file(tmp_path)
    found = score_classes(logits("ptq", "test")[:4], LABELS["test"][:4])
    assert found.log_probabilities is not None
    chunk = next(file.pending("ptq", "test"))
    with pytest.raises(ProtocolError, match="labels run from 0 to 3 and the model has 3 classes"):
        file.add(chunk, Scored(found.losses, found.log_probabilities[:, :3]))
    with pytest.raises(ProtocolError, match="for 4 samples"):
        file.add(chunk, Scored(found.losses, found.log_probabilities[:3]))
    with pytest.raises(NumericalError, match="ptq has a prediction"):
        file.add(chunk, Scored(found.losses, np.full_like(found.log_probabilities, np.nan)))


def test_experts_of_other_class_counts_are_refused(tmp_path: Path) -> None:
    file = table_file(tmp_path)
    score(file)
    for chunk in file.chunks("brecq", "test"):
        rows = list(chunk.rows)
        file.add(chunk, score_classes(logits("brecq", "test", 9)[rows], LABELS["test"][rows]))
    file.merge(tmp_path / "losses.parquet", tmp_path / "predictions.parquet")
    with pytest.raises(ProtocolError, match="brecq predicts 9 classes and the base model 7"):
        read_predictions(tmp_path / "predictions.parquet", "test")


def test_missing_and_damaged_files_say_what_to_do(merged: Path) -> None:
    path = merged / "predictions.parquet"
    with pytest.raises(ProtocolError, match="did you mean 'router_validation'"):
        read_predictions(path, "validation")
    file = table_file(merged)
    (merged / "parts" / "predictions" / "ptq-test-00001.parquet").unlink()
    with pytest.raises(CheckpointError, match="ptq-test-00001"):
        file.merge(merged / "losses.parquet", path)
    with pytest.raises(CheckpointError, match="other columns"):
        read_predictions(merged / "losses.parquet", "test")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="delete it"):
        read_predictions(path, "test")
