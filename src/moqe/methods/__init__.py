"""Quantization methods: closed-form functions of a weight and the statistics of its input.

rtn          round to nearest: the baseline
gptq         Frantar et al. 2023, arXiv 2210.17323
awq          Lin et al. 2024, arXiv 2306.00978
smoothquant  Xiao et al. 2023, arXiv 2211.10438
kquants      ggml's block types, without data
imatrix      rounding weighted by the mean square of each input channel: ggml's block types and integer schemes
"""

from __future__ import annotations

from moqe.errors import RecipeError, did_you_mean
from moqe.methods.awq import Awq
from moqe.methods.gptq import Gptq
from moqe.methods.imatrix import Imatrix
from moqe.methods.kquants import KQuants
from moqe.methods.method import Method
from moqe.methods.rtn import Rtn
from moqe.methods.smoothquant import SmoothQuant
from moqe.recipe import Expert
from moqe.schemes import Scheme, scheme

METHODS: dict[str, Method] = {
    "rtn": Rtn(),
    "gptq": Gptq(),
    "awq": Awq(),
    "smoothquant": SmoothQuant(),
    "kquants": KQuants(),
    "imatrix": Imatrix(),
}

GROUP_SIZES = (0, 32, 64, 128)


def method_named(name: str) -> Method:
    """Look a method up. Raises RecipeError on an unknown name."""
    if name not in METHODS:
        raise RecipeError(f"unknown method {name!r}; {did_you_mean(name, METHODS)}")
    return METHODS[name]


def check(expert: Expert) -> Scheme:
    """The scheme of an expert, after checking that its method, scheme and options go together.

    Raises RecipeError: unknown method or scheme, a scheme the method lacks, an option that would have no effect.
    """
    where = f"expert {expert.name!r}"
    try:
        chosen = method_named(expert.method)
        wanted = scheme(expert.scheme, expert.group_size, expert.symmetric, expert.scale_bits)
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from None
    reason = chosen.supports(wanted)
    if reason:
        raise RecipeError(f"{where}: {expert.method} has no scheme {expert.scheme}: {reason}")
    if not wanted.is_block:
        if wanted.group_size not in GROUP_SIZES:
            raise RecipeError(
                f"{where}: group_size {wanted.group_size} is not one of {', '.join(map(str, GROUP_SIZES))} "
                "(0 is one scale per output channel)"
            )
        if wanted.activation_bits < 16 and not wanted.symmetric:
            raise RecipeError(
                f"{where}: scheme {expert.scheme} multiplies integers, which needs symmetric weights: remove symmetric"
            )
    _check_options(expert, chosen, wanted, where)
    return wanted


def _check_options(expert: Expert, chosen: Method, wanted: Scheme, where: str) -> None:
    """Refuse options that this method and scheme would not read."""
    sections = {"rtn", "gptq", "awq", "smoothquant"} - {expert.method}
    for section in sorted(sections & expert.model_fields_set):
        raise RecipeError(f"{where}: options of {section} have no effect on {expert.method}: remove {section}")
    if not chosen.calibrated:
        if expert.calibration:
            raise RecipeError(f"{where}: {expert.method} uses no calibration data: remove calibration")
        if expert.sequential:
            raise RecipeError(f"{where}: {expert.method} uses no calibration data: remove sequential")
    if expert.block_fallback:
        if not wanted.is_block:
            raise RecipeError(f"{where}: {expert.scheme} has no blocks to fall back from: remove block_fallback")
        fallback = scheme(expert.block_fallback)
        if not fallback.is_block or fallback.block_size >= wanted.block_size:
            raise RecipeError(
                f"{where}: block_fallback {expert.block_fallback} must be a block scheme of smaller blocks than "
                f"{expert.scheme}, for example q4_0"
            )
