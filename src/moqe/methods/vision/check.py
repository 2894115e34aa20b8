"""Do an image expert's method, scheme and options go together?"""

from __future__ import annotations

from moqe.errors import RecipeError, did_you_mean
from moqe.methods.vision import VISION_METHODS
from moqe.recipe import Expert
from moqe.schemes import Scheme, vision_scheme


def check(expert: Expert) -> Scheme:
    """The scheme of an image expert.

    Raises RecipeError: unknown method or scheme, an option that would have no effect.
    """
    where = f"expert {expert.name!r}"
    if expert.method not in VISION_METHODS:
        raise RecipeError(f"{where}: unknown method {expert.method!r}; {did_you_mean(expert.method, VISION_METHODS)}")
    try:
        wanted = vision_scheme(expert.scheme)
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from None
    for section in sorted((VISION_METHODS.keys() - {expert.method}) & expert.model_fields_set):
        raise RecipeError(f"{where}: options of {section} have no effect on {expert.method}: remove {section}")
    return wanted
