"""Whose classes are whose: a data set's class names become the model's class indices.

    names equal the model's      matched by name, whatever their order; capitals, _ and - do not matter
    names are numbers 0 .. n-1   are the indices
    names are ImageNet's         n01440764 and its like: all of them, in their order
    the model has no names       all classes, in the order of the names

A model may have a class that no data set has: "background", its first one (MobileNet of TensorFlow: 1,001 classes on
ImageNet). Data with exactly one class less is matched with the others. Bare numbers count the model's classes if the
model's last one is among them, and the others if 0 is and the last is not, for nobody labels images as background.

Anything else is an error: images under a wrong label look like a bad model.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from moqe.errors import DataError, did_you_mean

BACKGROUND = "background"
_WORDNET = re.compile(r"n\d{8}")


def class_indices(
    names: Sequence[str], labels: Sequence[str] | None, classes: int, where: str, numbered: bool
) -> tuple[int, ...]:
    """For every class name of a data set, the model's class index.

    names: in the data set's order, which is the alphabet's for folders. labels: the model's names, or None. numbered:
    the data set numbers its classes itself, so that a name that is a number is a name like any other.
    Raises DataError, beginning with `where`, when they do not match or their number differs.
    """
    if labels is not None and has_background(labels) and _all_others(names, labels, numbered):
        return tuple(1 + index for index in class_indices(names, labels[1:], classes - 1, where, numbered))
    if labels is not None and (matched := _matched(names, labels, where)) is not None:
        return matched
    if all(name.isdecimal() for name in names) and not numbered:
        return _numbers(names, labels, classes, where)
    if len(names) != classes:
        raise DataError(
            f"{where} has {len(names)} classes and the model has {classes}: give all classes of the model"
            + (f", or name them as the model does ({_some(labels)})" if labels is not None else "")
        )
    if labels is not None and not all(_WORDNET.fullmatch(name) for name in names):
        raise DataError(
            f"the classes of {where} ({_some(names)}) are not those of the model ({_some(labels)}): rename them, or "
            "choose the data that the model was trained for"
        )
    return tuple(range(classes))


def has_background(labels: Sequence[str] | None) -> bool:
    """Whether a model's first class is the one that data sets do not have. labels: its names, or None."""
    return labels is not None and _plain(labels[0]) == BACKGROUND


def first_number(numbers: Collection[int], labels: Sequence[str] | None, classes: int, where: str) -> int:
    """The model's class index of number 0 of data whose classes have no names: 0, or 1 where it lacks the background.

    numbers: those that occur, all from 0 to classes - 1.
    Raises DataError, beginning with `where`, when they do not tell.
    """
    if not has_background(labels) or classes - 1 in numbers:
        return 0
    if 0 not in numbers:
        raise DataError(
            f"{where}: no image has class number 0 or {classes - 1}, so that the numbers do not tell whether they "
            f"count the model's class {BACKGROUND!r}: use names for classes, or add images"
        )
    return 1


def _all_others(names: Sequence[str], labels: Sequence[str], numbered: bool) -> bool:
    """Whether names are as many as a model's classes without its background, and no numbers that count it."""
    if len(names) != len(labels) - 1 or any(_plain(name) == BACKGROUND for name in names):
        return False
    return numbered or not all(name.isdecimal() for name in names)


def _matched(names: Sequence[str], labels: Sequence[str], where: str) -> tuple[int, ...] | None:
    """Indices by name; None where no name is the model's at all, or names decide nothing because two are equal."""
    if [_plain(name) for name in names] == [_plain(label) for label in labels]:
        return tuple(range(len(labels)))
    index_of = {_plain(label): index for index, label in enumerate(labels)}
    strange = [name for name in names if _plain(name) not in index_of]
    if len(index_of) < len(labels) or len(strange) == len(names):
        return None
    if strange:
        raise DataError(
            f"{where}: class {strange[0]!r} is not one of the model's; {did_you_mean(strange[0], labels)}"
            + (f" ({len(strange)} such classes)" if len(strange) > 1 else "")
        )
    return tuple(index_of[_plain(name)] for name in names)


def _numbers(names: Sequence[str], labels: Sequence[str] | None, classes: int, where: str) -> tuple[int, ...]:
    indices = tuple(int(name) for name in names)
    if max(indices) >= classes:
        raise DataError(
            f"{where}: class {max(indices)} is out of range: the model has {classes} classes, from 0 to {classes - 1}"
        )
    first = first_number(indices, labels, classes, where)
    return tuple(first + index for index in indices)


def _plain(name: str) -> str:
    return " ".join(re.split(r"[\s_-]+", name.casefold())).strip()


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
