from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moqe.data.class_names import class_indices
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
    ],
)
def test_names_that_do_not_match(names, labels, message):
    with pytest.raises(DataError, match=message):
        indices(names, labels)
