import pytest
import torch

from moqe.errors import NumericalError, UnsupportedLayer
from moqe.formats.ggml_blocks import pack
from moqe.methods.ggml_rounding import GRIDS, round_to_blocks
from moqe.methods.grids import round_to_grid, searched_grid
from moqe.methods.imatrix import Imatrix, imatrix
from moqe.methods.kquants import kquants
from moqe.methods.statistics import accumulate
from moqe.quantized import IntegerTensor
from moqe.recipe import Expert
from moqe.schemes import SCHEMES

TYPES = sorted(GRIDS)


def gaussian(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02


def uneven_importance(columns: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(columns, generator=torch.Generator().manual_seed(seed)).mul(1.5).exp()


def weighted_error(result: torch.Tensor, weight: torch.Tensor, importance: torch.Tensor) -> float:
    return float(((result - weight).square() * importance).sum())


@pytest.mark.parametrize("name", TYPES)
def test_beats_kquants_on_its_own_importance(name):
    weight, importance = gaussian(16, 512), uneven_importance(512)
    ours = weighted_error(imatrix(weight, importance, SCHEMES[name]).dequantize(), weight, importance)
    plain = weighted_error(kquants(weight, SCHEMES[name]).dequantize(), weight, importance)
    assert ours < plain


@pytest.mark.parametrize("name", ["q2_k", "q4_k", "q6_k", "q8_0"])
def test_even_importance_is_no_weighting(name):
    weight = gaussian(4, 256)
    even = imatrix(weight, torch.full((256,), 4.0), SCHEMES[name])
    assert torch.equal(pack(even), pack(round_to_blocks(weight, None, SCHEMES[name])))


def test_scale_of_the_importance_does_not_matter():
    weight, importance = gaussian(4, 512), uneven_importance(512)
    expected = pack(imatrix(weight, importance, SCHEMES["q4_k"]))
    for factor in (2.0**-40, 2.0**40):
        assert torch.equal(pack(imatrix(weight, importance * factor, SCHEMES["q4_k"])), expected)


@pytest.mark.parametrize("name", TYPES)
def test_dead_channels_are_still_rounded_well(name):
    weight, importance = gaussian(8, 512), uneven_importance(512)
    importance[:256] = 0.0
    importance[300] = 1e8  # as strong as the outlier channels of language models
    result = imatrix(weight, importance, SCHEMES[name]).dequantize()
    assert torch.isfinite(result).all()
    dead = (result - weight)[:, :256].square().sum() / weight[:, :256].square().sum()
    assert dead < {2: 0.15, 3: 0.05}.get(SCHEMES[name].weight_bits, 0.02)


def test_q8_0_is_searched_with_weights():
    weight, importance = gaussian(8, 256), uneven_importance(256)
    weighted, plain = (imatrix(weight, i, SCHEMES["q8_0"]).dequantize() for i in (importance, torch.ones(256)))
    assert weighted_error(weighted, weight, importance) < 0.8 * weighted_error(plain, weight, importance)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_damaged_importance_is_refused(bad):
    importance = torch.ones(256)
    importance[3] = bad
    with pytest.raises(NumericalError, match="importance is negative or not finite"):
        imatrix(gaussian(2, 256), importance, SCHEMES["q4_k"])


def test_importance_of_nothing_is_refused():
    with pytest.raises(UnsupportedLayer, match="calibration inputs are zero"):
        imatrix(gaussian(2, 256), torch.zeros(256), SCHEMES["q4_k"])


def test_method_takes_the_importance_from_the_statistics():
    method = Imatrix()
    assert (method.name, method.calibrated) == ("imatrix", True)
    inputs = gaussian(200, 256, seed=5) * uneven_importance(256).sqrt()
    statistics = accumulate(None, inputs)
    expert = Expert(name="im", method="imatrix", scheme="q4_k")
    weight = gaussian(4, 256)
    tensor = method.quantize(weight, statistics, SCHEMES["q4_k"], expert, torch.bfloat16, {})
    expected = imatrix(weight, inputs.square().mean(0), SCHEMES["q4_k"])
    assert weighted_error(tensor.dequantize(), weight, statistics.importance) == pytest.approx(
        weighted_error(expected.dequantize(), weight, statistics.importance), rel=1e-3
    )


def test_method_refuses_a_layer_without_statistics():
    expert = Expert(name="im", method="imatrix", scheme="q4_k")
    with pytest.raises(UnsupportedLayer, match=r"none reached this layer.*method: kquants"):
        Imatrix().quantize(gaussian(2, 256), None, SCHEMES["q4_k"], expert, torch.bfloat16, {})


def test_method_supports_everything_but_quantized_activations():
    for name, scheme in SCHEMES.items():
        assert (Imatrix().supports(scheme) == "") == (scheme.activation_bits == 16), name
    assert "method: smoothquant" in Imatrix().supports(SCHEMES["w8a8"])


@pytest.mark.parametrize("name", ["w3a16", "w4a16"])
def test_integer_schemes_beat_the_same_search_without_importance(name):
    weight, importance = gaussian(16, 256), uneven_importance(256)
    result = imatrix(weight, importance, SCHEMES[name], torch.bfloat16)
    plain = round_to_grid(weight, *searched_grid(weight, SCHEMES[name], torch.bfloat16, None), SCHEMES[name])
    assert isinstance(result, IntegerTensor)
    assert result.scale.dtype == torch.bfloat16
    ours = weighted_error(result.dequantize(), weight, importance)
    assert ours < 0.9 * weighted_error(plain.dequantize(), weight, importance)
