"""Folders, parquet files, hub ids and bundled digits become labelled images."""

from __future__ import annotations

import io
import json
import logging
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from moqe.data.image_sources import Classes, read_images
from moqe.errors import DataError, MissingExtra
from moqe.recipe import Source

PETS = Classes(3, ("cat", "dog", "eel"))
NAMELESS = Classes(3)


def picture(value: int, kind: str = "PNG") -> bytes:
    """A small image, another one for each value."""
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (value % 256, value // 256, 0)).save(buffer, kind)
    return buffer.getvalue()


def folder(root: Path, classes: tuple[str, ...] = ("cat", "dog", "eel"), count: int = 2) -> Path:
    for index, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for number in range(count):
            (root / name / f"{number}.png").write_bytes(picture(index * 100 + number))
    return root


def labels(documents) -> list[int]:
    return [document.label for document in documents]


def table(path: Path, values: list[object], marks: list[object], image: str = "image", **columns) -> Path:
    pq.write_table(pa.table({image: values, "label": marks, **columns}), path)
    return path


def test_a_folder_takes_turns_by_class(tmp_path):
    found = read_images(Source(path=str(folder(tmp_path))), PETS)
    assert [Path(document.name).relative_to(tmp_path).as_posix() for document in found] == [
        "cat/0.png",
        "dog/0.png",
        "eel/0.png",
        "cat/1.png",
        "dog/1.png",
        "eel/1.png",
    ]
    assert labels(found) == [0, 1, 2, 0, 1, 2]
    assert [document.domain for document in found[:3]] == ["cat", "dog", "eel"]
    assert len({document.digest for document in found}) == 6
    assert found[4].content() == picture(101)


def test_a_folder_s_names_decide(tmp_path):
    found = read_images(Source(path=str(folder(tmp_path, ("Eel", "dog", "cat")))), PETS)
    assert {Path(d.name).parent.name: (d.label, d.domain) for d in found} == {
        "Eel": (2, "eel"),
        "dog": (1, "dog"),
        "cat": (0, "cat"),
    }


def test_imagenet_s_layout(tmp_path):
    names = ("n01440764", "n01443537", "n01484850")
    for part in ("train", "val"):
        for name in names:
            (tmp_path / part / name).mkdir(parents=True)
            (tmp_path / part / name / f"{part}_{name}.JPEG").write_bytes(picture(int(name[-3:]), "JPEG"))
    found = read_images(Source(path=str(tmp_path / "val")), PETS)
    assert labels(found) == [0, 1, 2]
    assert read_images(Source(path=str(tmp_path / "val")), NAMELESS)[0].domain == "n01440764"
    with pytest.raises(DataError, match=r"holds train, val, not classes: give one, .*train$"):
        read_images(Source(path=str(tmp_path)), PETS)


def test_a_range_of_images(tmp_path):
    source = Source(path=str(folder(tmp_path)), skip_documents=2, max_documents=3)
    assert labels(read_images(source, PETS)) == [2, 0, 1]
    with pytest.raises(DataError, match="has 6 images, and skip_documents leaves out 6"):
        read_images(Source(path=str(tmp_path), skip_documents=6), PETS)


@pytest.mark.parametrize(
    ("classes", "known", "message"),
    [
        (("cat", "dgo", "eel"), PETS, "class 'dgo' is not one of the model's; did you mean 'dog'"),
        (("Katze", "Hund"), PETS, "has 2 classes and the model has 3"),
        (("Katze", "Hund", "Aal"), PETS, r"the classes of .* \(Aal, Hund, Katze\) are not those of the model"),
        (("a", "b"), NAMELESS, "has 2 classes and the model has 3"),
        (("0", "1", "3"), NAMELESS, "class 3 is out of range"),
    ],
)
def test_folders_of_other_classes(tmp_path, classes, known, message):
    with pytest.raises(DataError, match=message):
        read_images(Source(path=str(folder(tmp_path, classes))), known)


def test_folders_that_are_none(tmp_path):
    with pytest.raises(
        DataError, match="does not exist: a source is a folder, a parquet file, a hub id or bundled:digits"
    ):
        read_images(Source(path=str(tmp_path / "nowhere")), PETS)
    (tmp_path / "cat.png").write_bytes(picture(0))
    with pytest.raises(DataError, match="has no folders: images lie in <class>/<file>"):
        read_images(Source(path=str(tmp_path)), PETS)
    with pytest.raises(DataError, match=r"cat.png is of an unknown kind: images come from a folder of classes"):
        read_images(Source(path=str(tmp_path / "cat.png")), PETS)
    folder(tmp_path)
    (tmp_path / "dog" / "notes.txt").write_text("passed over")
    assert len(read_images(Source(path=str(tmp_path)), PETS)) == 6
    for file in (tmp_path / "dog").glob("*.png"):
        file.unlink()
    with pytest.raises(DataError, match="dog holds no images"):
        read_images(Source(path=str(tmp_path)), PETS)


def test_what_is_no_image_is_found_at_once(tmp_path):
    folder(tmp_path)
    (tmp_path / "eel" / "1.png").write_bytes(b"<html>not found</html>")
    with pytest.raises(DataError, match=r"eel/1.png is not an image that Pillow can read \(it has no header"):
        read_images(Source(path=str(tmp_path)), PETS)


def test_animations_are_warned_of_once(tmp_path, caplog):
    caplog.set_level(logging.WARNING, "moqe")
    folder(tmp_path)
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    for name in ("a.gif", "b.gif"):
        frames[0].save(tmp_path / "cat" / name, save_all=True, append_images=frames[1:])
    read_images(Source(path=str(tmp_path)), PETS)
    (record,) = caplog.records
    assert record.getMessage().endswith("cat/a.gif has several frames (2 such images): the first counts")


@pytest.mark.parametrize("column", ["img", "image", "picture"])
@pytest.mark.parametrize("struct", [False, True])
def test_parquet(tmp_path, column, struct):
    values = [{"bytes": picture(i), "path": "x"} if struct else picture(i) for i in range(4)]
    path = table(tmp_path / "a.parquet", values, [2, 0, 1, 2], column, other=[1, 2, 3, 4])
    source = Source(path=str(path), column="" if column in ("img", "image") else column)
    found = read_images(source, PETS)
    assert labels(found) == [2, 0, 1, 2]
    assert [document.domain for document in found] == ["eel", "cat", "dog", "eel"]
    assert found[1].name == f"{path}, row 1"
    assert found[3].content() == picture(3)
    assert labels(read_images(source.model_copy(update={"skip_documents": 1, "max_documents": 2}), PETS)) == [0, 1]
    assert read_images(source, NAMELESS)[0].domain == "2"


def test_a_folder_of_parquet_files(tmp_path):
    (tmp_path / "data").mkdir()
    for number in (1, 0):
        table(tmp_path / "data" / f"train-{number}.parquet", [picture(number)], [number])
    assert labels(read_images(Source(path=str(tmp_path)), PETS)) == [0, 1]


def test_class_names_inside_parquet(tmp_path):
    content = pa.table({"image": [picture(0), picture(1)], "label": [0, 1]})
    stated = {"info": {"features": {"label": {"names": ["eel", "cat"], "_type": "ClassLabel"}}}}
    pq.write_table(content.replace_schema_metadata({"huggingface": json.dumps(stated)}), tmp_path / "a.parquet")
    assert labels(read_images(Source(path=str(tmp_path / "a.parquet")), PETS)) == [2, 0]
    with pytest.raises(DataError, match="has 2 classes and the model has 3"):
        read_images(Source(path=str(tmp_path / "a.parquet")), NAMELESS)
    assert read_images(Source(path=str(tmp_path / "a.parquet")), Classes(2))[0].domain == "eel"


def test_labels_that_are_names(tmp_path):
    path = table(tmp_path / "a.parquet", [picture(0), picture(1)], ["eel", "cat"])
    assert labels(read_images(Source(path=str(path)), PETS)) == [2, 0]
    with pytest.raises(DataError, match="class 'eel' is not one of the model's, which has no names"):
        read_images(Source(path=str(path)), NAMELESS)
    path = table(tmp_path / "b.parquet", [picture(0)], ["ele"])
    with pytest.raises(DataError, match=r"row 0: class 'ele' is not one .*did you mean 'eel'"):
        read_images(Source(path=str(path)), PETS)


def test_a_model_with_a_background(tmp_path):
    known = Classes(4, ("background", "cat", "dog", "eel"))
    for marks in ([2, 0, 1], [3, 1, 2], ["eel", "cat", "dog"]):
        found = read_images(Source(path=str(table(tmp_path / "a.parquet", list(map(picture, range(3))), marks))), known)
        assert [(document.label, document.domain) for document in found] == [(3, "eel"), (1, "cat"), (2, "dog")]
    path = table(tmp_path / "a.parquet", [picture(0), picture(1)], ["dog", "cat"])
    assert labels(read_images(Source(path=str(path)), known)) == [2, 1]
    path = table(tmp_path / "a.parquet", [picture(0), picture(1)], [1, 2])
    with pytest.raises(DataError, match=r"a.parquet: no image has class number 0 or 3.*'background'"):
        read_images(Source(path=str(path)), known)
    path = table(tmp_path / "a.parquet", [picture(0), picture(1)], [0, 4])
    with pytest.raises(DataError, match="row 1: label 4 is out of range: there are 4 classes"):
        read_images(Source(path=str(path)), known)
    found = read_images(Source(path=str(folder(tmp_path / "tree", ("n01440764", "n01443537", "n01484850")))), known)
    assert [(document.label, document.domain) for document in found[:3]] == [(1, "cat"), (2, "dog"), (3, "eel")]


@pytest.mark.parametrize(
    ("values", "marks", "options", "message"),
    [
        ([picture(0)], [3], {}, r"row 0: label 3 is out of range: there are 3 classes, from 0 to 2$"),
        ([picture(0)], [-1], {}, "row 0: label -1 is out of range"),
        ([picture(0)], [0.5], {}, "row 0: the label is float, not the index or the name of a class"),
        ([picture(0)], [None], {}, "row 0: the label is NoneType"),
        ([None], [0], {}, "row 0: column 'image' holds NoneType, not the bytes"),
        (["cat.png"], [0], {}, "row 0: column 'image' holds str, not the bytes"),
        ([b"cat"], [0], {}, "row 0 is not an image"),
        ([picture(0)], [0], {"column": "imag"}, "has no column 'imag'; did you mean 'image'"),
        ([picture(0)], [0], {"label_column": "labels"}, "has no column 'labels'; did you mean 'label'"),
        ([], [], {}, "holds no images"),
    ],
)
def test_bad_rows(tmp_path, values, marks, options, message):
    path = table(tmp_path / "a.parquet", values, marks)
    with pytest.raises(DataError, match=message):
        read_images(Source(path=str(path), **options), PETS)


def test_damaged_parquet(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match=r"a.parquet cannot be read as parquet"):
        read_images(Source(path=str(tmp_path / "a.parquet")), PETS)


def test_a_file_that_disappears(tmp_path):
    (document, *_) = read_images(Source(path=str(folder(tmp_path))), PETS)
    (tmp_path / "cat" / "0.png").unlink()
    with pytest.raises(DataError, match=r"cat/0.png cannot be read: No such file"):
        document.content()


class Rows(list):
    """What the hub library returns when it streams."""

    features: dict[str, object] = {"image": None, "label": SimpleNamespace(names=["dog", "cat", "eel"])}  # noqa: RUF012
    cast: tuple[str, bool] | None = None

    def cast_column(self, column: str, kind: SimpleNamespace) -> Rows:
        Rows.cast = column, kind.decode
        return self


@pytest.fixture
def hub(monkeypatch):
    module = ModuleType("datasets")
    module.exceptions = SimpleNamespace(DatasetsError=type("DatasetsError", (Exception,), {}))
    module.Image = lambda decode: SimpleNamespace(decode=decode)
    module.asked = []

    def load_dataset(path, subset, split, streaming):
        module.asked.append((path, subset, split, streaming))
        if split == "nowhere":
            raise ValueError("Unknown split 'nowhere'")
        return Rows({"image": {"bytes": picture(i), "path": None}, "label": i % 3} for i in range(5))

    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    return module


def test_a_hub_id_is_streamed_undecoded(hub):
    found = read_images(Source(path="owner/name", split="test", max_documents=4), PETS)
    assert labels(found) == [1, 0, 2, 1]
    assert found[2].name == "owner/name#2"
    assert hub.asked == [("owner/name", None, "test", True)]
    assert Rows.cast == ("image", False)


@pytest.mark.usefixtures("hub")
def test_hub_errors():
    with pytest.raises(DataError, match="'owner/name' cannot be loaded: Unknown split 'nowhere'"):
        read_images(Source(path="owner/name", split="nowhere"), PETS)
    with pytest.raises(DataError, match="owner/name has no column 'fine_label'"):
        read_images(Source(path="owner/name", label_column="fine_label"), PETS)


def test_the_hub_needs_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtra, match=r"'owner/name' is not on this disk.*\.\[hub\]"):
        read_images(Source(path="owner/name"), PETS)


def test_bundled_digits():
    pytest.importorskip("sklearn")
    found = read_images(Source(path="bundled:digits/test", max_documents=20), Classes(10, tuple("0123456789")))
    assert len(found) == 20
    assert all(document.domain == str(document.label) for document in found)
    assert found[0].name.startswith("bundled:digits/test#digits-")
    for path, message in (("bundled:digits", "has no part ''"), ("bundled:digit/test", "unknown bundled images")):
        with pytest.raises(DataError, match=message):
            read_images(Source(path=path), Classes(10))
