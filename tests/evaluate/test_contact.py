from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from moqe.evaluate.contact import SHOWN, contact_sheet
from moqe.evaluate.outcome import cascaded, routed
from moqe.router import Cascade

Images = Callable[..., Any]


def test_one_image_by_hand(scored_images: Images) -> None:
    agree, differ = [[2.0, 0.0], [1.0, 0.0]], [[2.0, 0.0], [0.0, 1.0]]
    images = scored_images(np.array([agree, differ]), np.array([[1.0, 0.0]] * 2), [0, 1], ("a", "b"))
    mixture = routed(images.tables, np.array([0, 1]))
    sheet = contact_sheet(images.predictions, mixture, ("cat", "dog"), lambda row: f"picture {row}".encode())
    assert (sheet.disagreements, sheet.n_samples, len(sheet.images)) == (1, 2, 1)
    (image,) = sheet.images
    assert (image.png, image.label, image.asked) == (b"picture 1", "dog", ("b",))
    assert {name: (one.name, one.right) for name, one in image.experts.items()} == {
        "a": ("cat", False),
        "b": ("dog", True),
    }
    assert np.isclose(image.experts["a"].probability, 1 / (1 + np.exp(-2)), atol=1e-3)
    assert (image.base.name, image.base.right) == ("cat", False)
    assert image.mixture == image.experts["b"]


def test_a_cascade_answers_with_the_mean(scored_images: Images) -> None:
    images = scored_images(np.array([[[0.2, 0.0], [0.0, 3.0]]]), np.array([[1.0, 0.0]]), [1], ("a", "b"))
    answer = Cascade(0.9, (1, 0)).answer(
        torch.zeros(1, dtype=torch.int64), torch.from_numpy(images.predictions.probabilities)
    )
    mixture = cascaded(images.tables, images.predictions, answer)
    (image,) = contact_sheet(images.predictions, mixture, ("cat", "dog"), lambda row: b"").images
    assert image.asked == ("a", "b")
    assert (image.mixture.name, image.mixture.right) == ("dog", True)
    mean = (image.experts["a"].probability, image.experts["b"].probability)
    assert np.isclose(image.mixture.probability, (1 - mean[0] + mean[1]) / 2, atol=1e-3)


def test_images_are_spread_over_all_disagreements(simulated_images: Images) -> None:
    images = simulated_images(0)
    answers = images.predictions.log_probabilities.argmax(2)
    differing = np.flatnonzero((answers != answers[:, :1]).any(1))
    assert len(differing) > SHOWN
    asked: list[int] = []

    def picture(row: int) -> bytes:
        asked.append(row)
        return b"png"

    sheet = contact_sheet(images.predictions, routed(images.tables, np.zeros(300, np.int64)), images.classes, picture)
    assert len(sheet.images) == len(set(asked)) == SHOWN
    assert set(asked) <= set(differing.tolist())
    assert (asked[0], asked[-1]) == (differing[0], differing[-1])
    assert asked == sorted(asked)
    assert sheet.disagreements == len(differing)


def test_images_without_a_picture_are_left_out(simulated_images: Images) -> None:
    images = simulated_images(0, n=30)
    mixture = routed(images.tables, np.zeros(30, np.int64))
    assert contact_sheet(images.predictions, mixture, images.classes, lambda row: None).images == ()


def test_experts_that_agree_leave_an_empty_sheet(simulated_images: Images) -> None:
    images = simulated_images(0, n=30, experts=("only",))
    sheet = contact_sheet(
        images.predictions, routed(images.tables, np.zeros(30, np.int64)), images.classes, lambda row: b""
    )
    assert (sheet.images, sheet.disagreements) == ((), 0)
