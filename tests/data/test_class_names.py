from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moqe.data.class_names import class_indices, first_number
from moqe.errors import DataError

LABELS = ("tabby cat", "dog", "zebra")


def indices(names, labels=LABELS, classes=3, numbered=False):
    return class_indices(names, labels, classes, "pets", numbered)


@given(st.permutations(range(6)))
def test_names_decide_whatever_their_order(order):
    labels = tuple("abcdef")
    assert class_indices([labels[i] for i in order], labels, 6, "pets", False) == tuple(order)


def test_capitals_and_joining_characters_do_not_matter():
    assert indices(["Dog", "tabby_cat", "ZEBRA"]) == (1, 0, 2)


def test_some_classes_are_enough_where_they_have_names():
    assert indices(["zebra"]) == (2,)


def test_equal_lists_need_no_unique_names():
    assert indices(["crane", "crane", "dog"], ("crane", "crane", "dog")) == (0, 1, 2)


def test_numbers_are_indices_in_folders_and_names_in_numbered_data():
    names = ["0", "1", "10", "2"]
    assert indices(names, None, 11) == (0, 1, 10, 2)
    assert indices(names, None, 4, numbered=True) == (0, 1, 2, 3)


def test_imagenet_s_folders_are_in_order():
    assert indices(["n01440764", "n01443537", "n01484850"]) == (0, 1, 2)


def test_a_model_without_names_takes_the_alphabet():
    assert indices(["a", "b", "c"], None) == (0, 1, 2)


WITH_BACKGROUND = ("background", "tench, Tinca tinca", "crane", "crane")
NAMES_OR_NUMBERS = [
    (["n01440764", "n01443537", "n01484850"], False, (1, 2, 3)),
    (["tench, Tinca tinca", "crane", "crane"], True, (1, 2, 3)),
    (["2", "0", "1"], False, (3, 1, 2)),  # the numbers of 0 to 2: without the background
    (["3", "1", "2"], False, (3, 1, 2)),  # the model's own
    (["0", "1", "2", "3"], False, (0, 1, 2, 3)),
    (["0", "2"], False, (1, 3)),
    (["Background", "tench, Tinca tinca", "crane", "crane"], True, (0, 1, 2, 3)),
]


@pytest.mark.parametrize(("names", "numbered", "expected"), NAMES_OR_NUMBERS)
def test_data_without_the_model_s_background(names, numbered, expected):
    assert indices(names, WITH_BACKGROUND, 4, numbered) == expected


def test_only_the_first_class_is_a_background():
    assert indices(["cat", "dog"], ("background", "dog", "cat")) == (2, 1)
    assert indices(["dog", "background"], ("background", "dog", "cat")) == (1, 0)
    with pytest.raises(DataError, match="has 2 classes and the model has 3"):
        indices(["n01440764", "n01443537"], ("dog", "cat", "background"))


@given(st.sets(st.integers(0, 9), min_size=1))
def test_numbers_that_tell_where_they_begin(numbers):
    labels = ("background", *"abcdefghi")
    assert first_number(numbers | {9}, labels, 10, "pets") == 0
    assert first_number((numbers | {0}) - {9}, labels, 10, "pets") == 1
    assert first_number(numbers, None, 10, "pets") == first_number(numbers, "bcdefghijk", 10, "pets") == 0


@pytest.mark.parametrize(
    ("names", "labels", "message"),
    [
        (
            ["dog", "zebre", "cow"],
            LABELS,
            r"^pets: class 'zebre' is not one .*did you mean 'zebra'\? \(2 such classes\)$",
        ),
        (["Hund", "Katze", "Maus"], LABELS, r"^the classes of pets \(Hund, Katze, Maus\) are not those of the model"),
        (["n01440764", "Katze", "Maus"], LABELS, "are not those of the model"),
        (["dog", "crane"], ("crane", "crane", "dog"), "has 2 classes and the model has 3"),
        (["Hund", "Katze"], LABELS, "^pets has 2 classes and the model has 3: .*name them as the model does"),
        (["a", "b"], None, "^pets has 2 classes and the model has 3: give all"),
        (["n01440764", "n01443537"], LABELS, "^pets has 2 classes and the model has 3"),
        (["0", "3"], None, "^pets: class 3 is out of range: the model has 3 classes, from 0 to 2$"),
        (
            ["1"],
            ("background", "dog", "cat"),
            r"^pets: no image has class number 0 or 2, so .* do not tell .* class 'background': use names",
        ),
        (["cat", "dgo"], ("background", "dog", "cat"), "^pets: class 'dgo' is not one .*did you mean 'dog'"),
        (["Hund", "Katze"], ("background", "dog", "cat"), r"\(Hund, Katze\) are not those of the model \(dog, cat\)"),
        (["n01440764"], ("background", "dog", "cat"), "^pets has 1 classes and the model has 3"),
    ],
)
def test_names_that_do_not_match(names, labels, message):
    with pytest.raises(DataError, match=message):
        indices(names, labels)
