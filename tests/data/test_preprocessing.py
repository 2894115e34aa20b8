from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from moqe import recipe
from moqe.data.preprocessing import Preprocessing
from moqe.errors import DataError, RecipeError

MEAN, STD = (0.1, 0.2, 0.3), (0.5, 1.0, 2.0)


def picture(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_the_shorter_edge_keeps_the_shape_rounded_down():
    whole = Preprocessing(20, (20, 20), MEAN, STD)
    tall = picture(31, 40)
    resized = tall.resize((20, 25), Image.Resampling.BILINEAR)  # 40 * 20 / 31 = 25.8
    assert torch.equal(whole.arrange(tall, "it"), torch.tensor(np.asarray(resized))[2:22].permute(2, 0, 1))
    wide = picture(40, 31)
    resized = wide.resize((25, 20), Image.Resampling.BILINEAR)
    assert torch.equal(whole.arrange(wide, "it"), torch.tensor(np.asarray(resized))[:, 2:22].permute(2, 0, 1))


def test_a_crop_is_from_the_centre_an_odd_pixel_left_at_the_end():
    image = picture(7, 6)
    found = Preprocessing(None, (3, 4), MEAN, STD).arrange(image, "it")
    assert torch.equal(found, torch.tensor(np.asarray(image))[1:4, 1:5].permute(2, 0, 1))


@pytest.mark.parametrize("interpolation", ["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"])
def test_interpolations(interpolation):
    found = Preprocessing((4, 9), (4, 9), MEAN, STD, interpolation).arrange(picture(13, 11), "it")
    expected = picture(13, 11).resize((9, 4), Image.Resampling[interpolation.upper()])
    assert torch.equal(found, torch.tensor(np.asarray(expected)).permute(2, 0, 1))


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 40), st.data())
def test_every_image_gets_the_same_size(width, height, edge, data):
    crop = data.draw(st.tuples(st.integers(1, edge), st.integers(1, edge)))
    preprocessing = Preprocessing(edge, crop, MEAN, STD)
    assert preprocessing.size == crop
    assert preprocessing.arrange(picture(width, height), "it").shape == (3, *crop)


def test_one_pixel_is_enlarged():
    found = Preprocessing(5, (4, 4), MEAN, STD).arrange(Image.new("RGB", (1, 1), (1, 2, 3)), "it")
    assert torch.equal(found, torch.tensor([1, 2, 3], dtype=torch.uint8)[:, None, None].expand(3, 4, 4))


def test_values_are_rescaled_and_normalised():
    pixels = torch.tensor([[[[0]], [[51]], [[255]]]], dtype=torch.uint8)
    found = Preprocessing(1, (1, 1), MEAN, STD).normalise(pixels)
    assert found.dtype == torch.float32
    assert found.flatten().tolist() == pytest.approx([-0.2, 0.0, 0.35], abs=1e-6)
    unscaled = Preprocessing(1, (1, 1), (0.0,) * 3, (1.0,) * 3, rescale=1.0).normalise(pixels)
    assert torch.equal(unscaled, pixels.float())


def test_images_that_do_not_fit():
    with pytest.raises(DataError, match=r"it is 5 x 4 pixels where 6 x 3 are to be cut from it: set resize"):
        Preprocessing(None, (3, 6), MEAN, STD).arrange(picture(5, 4), "it")
    with pytest.raises(DataError, match=r"strip is 1 x 20000 pixels, and resizing it makes 224 x 4,480,000: remove it"):
        Preprocessing(224, (224, 224), MEAN, STD).arrange(Image.new("RGB", (1, 20_000)), "strip")


def test_a_recipe_s_preprocessing():
    stated = recipe.Preprocessing(resize=40, crop=32, mean=MEAN, std=STD, interpolation="bicubic")
    assert Preprocessing.from_recipe(stated) == Preprocessing(40, (32, 32), MEAN, STD, "bicubic")
    assert Preprocessing.from_recipe(stated.model_copy(update={"crop": None})).crop == (40, 40)
    assert Preprocessing.from_recipe(stated.model_copy(update={"resize": None})).resize is None
    with pytest.raises(RecipeError, match="states no size: add crop"):
        Preprocessing.from_recipe(stated.model_copy(update={"resize": None, "crop": None}))


def test_one_line_for_people():
    line = "values x 1/255, mean 0.1 0.2 0.3, std 0.5 1 2"
    assert Preprocessing(256, (224, 200), MEAN, STD).describe() == (
        f"shorter edge to 256 (bilinear), centre crop 200 x 224, {line}"
    )
    assert Preprocessing((3, 4), (3, 4), MEAN, STD).describe() == f"resize to 4 x 3 (bilinear), {line}"
    assert Preprocessing(None, (8, 8), MEAN, STD).describe() == f"size as it is, centre crop 8 x 8, {line}"


def test_the_digest_names_every_field():
    first = Preprocessing(8, (8, 8), MEAN, STD)
    others = [
        Preprocessing(9, (8, 8), MEAN, STD),
        Preprocessing(8, (8, 7), MEAN, STD),
        Preprocessing(8, (8, 8), STD, STD),
        Preprocessing(8, (8, 8), MEAN, MEAN),
        Preprocessing(8, (8, 8), MEAN, STD, "bicubic"),
        Preprocessing(8, (8, 8), MEAN, STD, rescale=1.0),
    ]
    assert len({first.digest, *(other.digest for other in others)}) == 7
