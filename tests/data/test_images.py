"""Samples of images, their pixels, and their splits."""

from __future__ import annotations

import io
import logging
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from moqe.data import images
from moqe.data.classification import class_values
from moqe.data.image_sources import ImageDocument
from moqe.data.images import ImageSamples, ImageStore, PreparedImages, make_image_splits
from moqe.data.preprocessing import Preprocessing
from moqe.errors import DataError
from moqe.recipe import Data, Source
from moqe.store import digest_bytes

PLAIN = Preprocessing(None, (4, 4), (0.0,) * 3, (1.0,) * 3, rescale=1.0)
HALVED = Preprocessing(2, (2, 2), (0.5,) * 3, (0.5,) * 3)


def picture(value: int, size: int = 4) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), (value, value // 2, 255 - value)).save(buffer, "PNG")
    return buffer.getvalue()


def document(value: int, label: int = 0, content: bytes | None = None) -> ImageDocument:
    content = picture(value) if content is None else content
    return ImageDocument(f"{value}.png", label, str(label), digest_bytes(content)[:16], content)


def samples(count: int = 6) -> ImageSamples:
    return ImageSamples.of([document(10 * i, i % 2) for i in range(count)])


def decodes(monkeypatch) -> list[str]:
    """The names of what is decoded from here on."""
    names: list[str] = []
    original = images.decode
    monkeypatch.setattr(images, "decode", lambda content, name: names.append(name) or original(content, name))
    return names


def test_samples_and_selections():
    found = samples()
    assert (len(found), found.labels.tolist()) == (6, [0, 1, 0, 1, 0, 1])
    some = found.select([4, 1]).select([1, 0, 0])
    assert some.labels.tolist() == [1, 0, 0]
    assert some.domain == ("1", "0", "0")
    assert some.document == tuple(found.document[i] for i in (1, 4, 4))
    assert some.pixels([0, 1, 2], PLAIN)[:, 0, 0, 0].tolist() == [10.0, 40.0, 40.0]
    assert np.asarray(some.picture(1))[0, 0].tolist() == [40, 20, 215]


def test_the_digest_names_images_labels_and_order():
    first = samples()
    relabelled = ImageSamples.of([document(10 * i, 0) for i in range(6)])
    assert samples().digest == first.digest
    assert len({first.digest, first.select([1, 0]).digest, first.select([0, 1]).digest, relabelled.digest}) == 4


def test_pixels_are_decoded_once_for_each_way_of_resizing(monkeypatch):
    found, names = samples(), decodes(monkeypatch)
    other = found.select([2, 3])
    expected = found.pixels([3, 0, 3], PLAIN)
    assert names == ["0.png", "30.png"]
    assert torch.equal(found.pixels(torch.tensor([3, 0, 3]), PLAIN), expected)
    assert torch.equal(other.pixels([1], PLAIN), expected[:1])  # a selection shares what was decoded
    assert names == ["0.png", "30.png"]
    assert found.pixels([3], HALVED).shape == (1, 3, 2, 2)
    assert names == ["0.png", "30.png", "30.png"]
    brighter = Preprocessing(None, (4, 4), (1.0,) * 3, (1.0,) * 3)
    found.pixels([3], brighter)  # the same sizes, so nothing to decode
    assert len(names) == 3
    for crop in ((1, 2), (1, 1)):
        cut = Preprocessing(2, crop, (0.0,) * 3, (1.0,) * 3)
        assert found.pixels([3], cut).shape == (1, 3, *crop)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=8), min_size=1, max_size=4))
def test_the_cache_changes_nothing(requests):
    documents = [document(10 * i) for i in range(6)]
    cached, plain = ImageStore(documents), ImageStore(documents, cache_bytes=0)
    for rows in map(torch.tensor, requests):
        assert torch.equal(cached.arranged(rows, HALVED), plain.arranged(rows, HALVED))


def test_large_splits_are_decoded_on_demand(monkeypatch):
    store, names = ImageStore([document(0), document(10)], cache_bytes=2 * 3 * 16 - 1), decodes(monkeypatch)
    for _ in range(2):
        store.arranged(torch.tensor([1]), PLAIN)
    assert names == ["10.png", "10.png"]
    assert not store._cached


def test_a_damaged_image_is_named():
    found = ImageSamples.of([document(1), document(2, content=picture(2)[:45])])
    with pytest.raises(DataError, match=r"^2.png is damaged or truncated \(.*\): repair or remove it$"):
        found.pixels([0, 1], PLAIN)


def test_an_image_of_another_size_is_named():
    found = ImageSamples.of([document(1), document(2, content=picture(2, 3))])
    with pytest.raises(DataError, match=r"^2.png is 3 x 3 pixels where 4 x 4 are to be cut from it"):
        found.pixels([0, 1], PLAIN)


def test_prepared_images_are_what_methods_see():
    found = samples().select([5, 4, 3])
    prepared = PreparedImages(found, HALVED, torch.device("cpu"))
    assert len(prepared) == 3
    assert torch.equal(prepared.labels, found.labels)
    assert torch.equal(prepared.batch(torch.tensor([2, 0])), found.pixels([2, 0], HALVED))


def rows(folder: Path, name: str, values: list[int], labels: list[int] | None = None) -> Source:
    path = folder / f"{name}.parquet"
    content = {"img": [picture(value) for value in values], "label": labels or [value % 3 for value in values]}
    pq.write_table(pa.table(content), path)
    return Source(path=str(path))


def data_of(folder: Path, calibration=range(9), router=range(60, 120), test=range(200, 230), **options) -> Data:
    return Data(
        calibration=(rows(folder, "calibration", list(calibration)),),
        router=(rows(folder, "router", list(router)),),
        test=(rows(folder, "test", list(test)),),
        **options,
    )


def test_the_four_sets_share_no_image_and_lose_none(tmp_path):
    splits = make_image_splits(data_of(tmp_path), None, 3, seed=0)
    assert {name: len(found) for name, found in splits.items()} == {
        "calibration": 9,
        "router_train": 45,
        "router_validation": 15,
        "test": 30,
    }
    assert len(set.union(*(set(found.document) for found in splits.values()))) == 99
    assert splits["router_validation"].labels.bincount().tolist() == [5, 5, 5]  # a share of every class
    value = int(splits["test"].pixels([7], PLAIN)[0, 0, 0, 0])
    assert (value, int(splits["test"].labels[7])) == (207, 207 % 3)


def test_class_names_are_domains(tmp_path):
    splits = make_image_splits(data_of(tmp_path), ("cat", "dog", "eel"), 3, seed=0)
    assert splits["calibration"].domain[:3] == ("cat", "dog", "eel")


def test_seed_and_share_decide_the_validation_set(tmp_path):
    def validation(seed: int, **options) -> ImageSamples:
        return make_image_splits(data_of(tmp_path, **options), None, 3, seed)["router_validation"]

    assert validation(0).digest == validation(0).digest
    assert len({validation(seed).digest for seed in range(4)}) > 1
    assert len(validation(0, validation_share=0.5)) == 30


def test_sample_limits_are_spread_over_classes(tmp_path):
    limits = {"calibration_samples": 3, "router_samples": 12, "test_samples": 6}
    splits = make_image_splits(data_of(tmp_path, **limits), None, 3, seed=0)
    assert {name: found.labels.bincount().tolist() for name, found in splits.items()} == {
        "calibration": [1, 1, 1],
        "router_train": [3, 3, 3],
        "router_validation": [1, 1, 1],
        "test": [2, 2, 2],
    }


@pytest.mark.parametrize(
    ("changed", "first", "second"),
    [
        ({"router": [*range(60, 70), 3]}, "calibration", "router"),
        ({"test": [3]}, "calibration", "test"),
        ({"test": [61]}, "router", "test"),
    ],
)
def test_an_image_in_two_splits_is_an_error(tmp_path, changed, first, second):
    message = rf"two splits: .*row \d+ \({first}\) and .*row \d+ \({second}\) have the same content"
    with pytest.raises(DataError, match=message):
        make_image_splits(data_of(tmp_path, **changed), None, 3, seed=0)


def test_a_repeated_image_counts_once(tmp_path, caplog):
    caplog.set_level(logging.WARNING, "moqe")
    assert len(make_image_splits(data_of(tmp_path, calibration=[0, 1, 2, 0]), None, 3, seed=0)["calibration"]) == 3
    assert "calibration.parquet, row 3 repeats" in caplog.text


def test_a_class_missing_from_calibration_is_named(tmp_path):
    data = data_of(tmp_path, calibration=[0, 3, 6])
    with pytest.raises(
        DataError, match=r"^2 of 3 classes have no calibration image: dog, eel; add images of every class"
    ):
        make_image_splits(data, ("cat", "dog", "eel"), 3, seed=0)
    with pytest.raises(DataError, match=r"^9 of 10 classes have no calibration image: 1, 2, 3, 4, 5, \.\.\.; add"):
        make_image_splits(data_of(tmp_path, calibration=[0]), None, 10, seed=0)


BACKGROUND = ("background", "cat", "dog", "eel")


def test_a_background_that_no_source_has(tmp_path):
    """A model with one class more than the data is right about every image that it is right about."""
    splits = make_image_splits(data_of(tmp_path), BACKGROUND, 4, seed=0)
    for found in splits.values():
        value = found.pixels(range(len(found)), PLAIN)[:, 0, 0, 0].long()
        logits = torch.nn.functional.one_hot(value % 3 + 1, 4).double()  # what the images show, as such a model says it
        assert class_values(logits.numpy(), found.labels.numpy())["top1"].mean() == 1.0
    assert splits["calibration"].domain[:3] == ("cat", "dog", "eel")


PARTS = {"calibration": [1, 2, 3], "router": [61, 62, 63], "test": [201, 202, 203]}


def test_other_classes_than_the_background_are_still_missed(tmp_path):
    data = data_of(tmp_path, calibration=[0, 3, 1])
    with pytest.raises(DataError, match=r"^1 of 4 classes have no calibration image: eel"):
        make_image_splits(data, BACKGROUND, 4, seed=0)
    with pytest.raises(DataError, match=r"^1 of 4 classes have no calibration image: fox"):
        make_image_splits(data_of(tmp_path), ("cat", "dog", "eel", "fox"), 4, seed=0)
    shifted = {part: rows(tmp_path, part, values, [1, 2, 3]) for part, values in PARTS.items()}
    with pytest.raises(DataError, match=r"^1 of 4 classes have no calibration image: cow"):
        make_image_splits(Data(**{part: (source,) for part, source in shifted.items()}), ("cow", *BACKGROUND[1:]), 4, 0)
    named = data_of(tmp_path).model_copy(update={"test": (rows(tmp_path, "all", [200, 201], [0, 3]),)})
    with pytest.raises(DataError, match=r"^1 of 4 classes have no calibration image: background"):
        make_image_splits(named, BACKGROUND, 4, seed=0)


def test_a_class_with_one_router_image_is_for_training_only(tmp_path):
    data = data_of(tmp_path, router=[60, 63, 66, 61])
    splits = make_image_splits(data, None, 3, seed=0)
    assert sorted(splits["router_train"].labels.tolist()) == [0, 0, 1]
    assert splits["router_validation"].labels.tolist() == [0]
    with pytest.raises(DataError, match="at most one image of each class"):
        make_image_splits(data_of(tmp_path, router=[60, 61, 62]), None, 3, seed=0)


def test_labels_out_of_range(tmp_path):
    source = rows(tmp_path, "bad", [1, 2], [0, 7])
    data = data_of(tmp_path).model_copy(update={"test": (source,)})
    with pytest.raises(DataError, match=r"bad.parquet, row 1: label 7 is out of range: there are 3 classes"):
        make_image_splits(data, None, 3, seed=0)
