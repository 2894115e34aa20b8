"""The contact sheet: images on which experts disagree, with what each of them answers.

The images are spread evenly over all on which not every expert gives the same answer, in the order of the test set, so
that the sheet shows what disagreement usually looks like, whoever is right.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moqe.evaluate.outcome import Outcome
from moqe.evaluate.predictions import Predictions

SHOWN = 24


@dataclass(frozen=True)
class Answer:
    """A class that was answered, its probability, and whether it is the true one."""

    name: str
    probability: float
    right: bool


@dataclass(frozen=True)
class ContactImage:
    """One image: a PNG, its true class, what base, experts and mixture answer, and whom the mixture asks."""

    png: bytes
    label: str
    base: Answer
    experts: Mapping[str, Answer]
    mixture: Answer
    asked: tuple[str, ...]


@dataclass(frozen=True)
class ContactSheet:
    """Images, and on how many of how many test images the experts disagree."""

    images: tuple[ContactImage, ...]
    disagreements: int
    n_samples: int


def contact_sheet(
    predictions: Predictions,
    mixture: Outcome,
    classes: Sequence[str],
    picture: Callable[[int], bytes | None],
) -> ContactSheet:
    """The sheet of the samples that `predictions` are about.

    mixture: who was asked; several experts answer by the mean of their probabilities. classes: names by number.
    picture: a sample's position to a PNG, or None where there is no picture, and then it is left out.
    """
    answers = predictions.log_probabilities.argmax(2)  # (n, experts)
    differing = np.flatnonzero((answers != answers[:, :1]).any(1))
    if len(differing) > SHOWN:
        shown = differing[np.linspace(0, len(differing) - 1, SHOWN).round().astype(np.int64)]
    else:
        shown = differing
    chosen = predictions.select(shown)
    probabilities = chosen.probabilities.astype(np.float64)  # (shown, experts, classes)
    weights = mixture.asked[shown] / mixture.asked[shown].sum(1, keepdims=True)
    together = (weights[:, :, None] * probabilities).sum(1)
    of_base = np.exp(chosen.base.astype(np.float64))
    images = []
    for i, row in enumerate(shown.tolist()):
        png = picture(row)
        if png is None:
            continue
        label = int(chosen.label[i])
        images.append(
            ContactImage(
                png,
                classes[label],
                _answer(of_base[i], label, classes),
                {name: _answer(probabilities[i, e], label, classes) for e, name in enumerate(chosen.experts)},
                _answer(together[i], label, classes),
                tuple(name for e, name in enumerate(chosen.experts) if weights[i, e] > 0),
            )
        )
    return ContactSheet(tuple(images), len(differing), len(predictions))


def _answer(probabilities: np.ndarray[tuple[int], np.dtype[np.float64]], label: int, classes: Sequence[str]) -> Answer:
    best = int(probabilities.argmax())
    return Answer(classes[best], float(probabilities[best]), best == label)
