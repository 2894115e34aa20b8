from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from moqe.errors import NumericalError, UnsupportedLayer
from moqe.formats.ggml_blocks import BLOCK_SCHEMES, LAYOUTS, pack, unpack
from moqe.methods.ggml_rounding import GRIDS, round_to_blocks
from moqe.methods.kquants import KQuants, kquants, magnitude_weighting
from moqe.recipe import Expert
from moqe.schemes import SCHEMES

TYPES = sorted(GRIDS)
SUPER = [name for name in TYPES if SCHEMES[name].block_size == 256]


def gaussian(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02


def relative_error(weight: torch.Tensor, scheme: str) -> float:
    error = (kquants(weight, SCHEMES[scheme]).dequantize() - weight).square().sum()
    return float(error / weight.square().sum())


def test_every_block_scheme_of_a_recipe_has_a_grid_that_fits_its_layout():
    assert set(GRIDS) == {name for name, scheme in SCHEMES.items() if scheme.is_block}
    for name, grid in GRIDS.items():
        low = -LAYOUTS[SCHEMES[name].block].offset
        assert SCHEMES[name].block_size % grid.run == 0
        if name == "q8_0":
            assert (grid.low, grid.high) == (-127, 127)  # ggml never stores -128
        elif low:
            assert (grid.low, grid.high) == (low, -low - 1)
        else:
            assert grid.high == 2 ** SCHEMES[name].weight_bits - 1


@pytest.mark.parametrize("name", TYPES)
def test_result_survives_the_file(name):
    tensor = kquants(gaussian(6, 512), SCHEMES[name])
    again = unpack(pack(tensor), SCHEMES[name])
    assert torch.equal(tensor.codes, again.codes)
    assert tensor.fields.keys() == again.fields.keys()
    for field, values in tensor.fields.items():
        assert values.dtype == again.fields[field].dtype
        assert torch.equal(values, again.fields[field])


def test_more_bits_are_never_worse():
    weight = gaussian(16, 512)
    for family in (["q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "q8_0"], ["q4_0", "q5_0", "q8_0"]):
        errors = [relative_error(weight, name) for name in family]
        assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("name", TYPES)
def test_rows_do_not_depend_on_each_other(name):
    weight = gaussian(300, 512)  # more than one chunk
    whole = pack(kquants(weight, SCHEMES[name]))
    assert torch.equal(pack(kquants(weight[7:12], SCHEMES[name])), whole[7:12])
    assert torch.equal(pack(kquants(weight[255:260], SCHEMES[name])), whole[255:260])


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_change_nothing(threads):
    weight = gaussian(600, 512)
    single = pack(kquants(weight, SCHEMES["q3_k"]))
    torch.set_num_threads(threads)
    assert torch.equal(pack(kquants(weight, SCHEMES["q3_k"])), single)
    assert torch.get_num_threads() == threads
    with ThreadPoolExecutor(1) as pool:  # new threads inherit torch's setting
        assert pool.submit(torch.get_num_threads).result() == threads


@pytest.mark.parametrize("name", TYPES)
def test_zero_rows_stay_zero(name):
    weight = gaussian(4, 512)
    weight[1] = 0.0
    weight[2, :256] = 0.0
    weight[3, 32:64] = 0.0
    result = kquants(weight, SCHEMES[name]).dequantize()
    assert torch.equal(result[1], torch.zeros(512))
    assert torch.equal(result[2, :256], torch.zeros(256))
    if name not in ("q2_k", "q4_k", "q5_k", "q4_1"):
        assert torch.equal(result[3, 32:64], torch.zeros(32))


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("value", [0.37, -0.37])
def test_constant_rows_are_nearly_exact(name, value):
    result = kquants(torch.full((2, 256), value), SCHEMES[name]).dequantize()
    assert (result - value).abs().max() < 0.002 * abs(value)


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e-8])
def test_tiny_weights_do_no_harm(name, size):
    weight = gaussian(4, 256) / 0.02 * size
    result = kquants(weight, SCHEMES[name]).dequantize()
    assert torch.isfinite(result).all()
    # Below float16's smallest number nothing but zero is left, which is no worse than leaving the weight out.
    assert (result - weight).square().sum() <= weight.square().sum()


@pytest.mark.parametrize("name", TYPES)
def test_small_weights_use_subnormal_scales(name):
    weight = gaussian(8, 512) / 0.02 * 1e-5
    assert relative_error(weight, name) < {2: 0.2, 3: 0.1}.get(SCHEMES[name].weight_bits, 0.06)


@pytest.mark.parametrize("name", TYPES)
def test_large_weights_keep_finite_scales_until_they_overflow(name):
    weight = gaussian(4, 256)
    weight *= 6.0e4 / weight.abs().max()
    assert relative_error(weight, name) < 0.12
    with pytest.raises(NumericalError, match=f"overflow.*{name} scale beyond float16.*on_unsupported"):
        kquants(weight * 1e5, SCHEMES[name])


@pytest.mark.parametrize("name", TYPES)
def test_largest_weights_allowed_are_represented(name):
    weight = gaussian(4, 256)
    with pytest.raises(NumericalError) as refused:
        kquants(weight * 1e20, SCHEMES[name])
    limit = float(str(refused.value).split("the limit is ")[1].split(")")[0]) * 0.99
    result = kquants(weight * (limit / weight.abs().max()), SCHEMES[name])
    assert all(torch.isfinite(field).all() for field in result.fields.values())
    assert ((result.dequantize() / limit - weight / weight.abs().max()).square().mean() < 0.02).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_weights_are_refused(bad):
    weight = gaussian(4, 256)
    weight[2, 17] = bad
    with pytest.raises(NumericalError, match="NaN or infinity"):
        kquants(weight, SCHEMES["q4_k"])


@pytest.mark.parametrize("name", SUPER)
def test_rows_that_do_not_fit_name_the_fix(name):
    with pytest.raises(UnsupportedLayer, match=rf"rows of 576 .* {name} blocks of 256: set block_fallback"):
        kquants(gaussian(2, 576), SCHEMES[name])


def test_rows_that_do_not_fit_the_smallest_blocks():
    with pytest.raises(UnsupportedLayer, match="q4_0 blocks of 32: set on_unsupported"):
        kquants(gaussian(2, 48), SCHEMES["q4_0"])


def test_magnitude_weighting_prefers_large_weights():
    weight = gaussian(2, 512)
    weighting = magnitude_weighting(weight, 1.0)
    order = weight[0, :32].abs().argsort()
    assert (weighting[0, :32][order].diff() >= 0).all()
    assert float(weighting.mean()) == pytest.approx(1.8, abs=0.1)  # 1 + the mean of |w| over its root mean square
    assert torch.equal(magnitude_weighting(torch.zeros(1, 256), 1.0), torch.ones(1, 256))


def test_weighting_moves_the_error_to_where_it_counts_least():
    weight = gaussian(8, 512)
    weighting = torch.where(torch.arange(512) % 2 == 0, 100.0, 1.0)
    even = round_to_blocks(weight, None, SCHEMES["q3_k"]).dequantize() - weight
    skewed = round_to_blocks(weight, weighting, SCHEMES["q3_k"]).dequantize() - weight
    assert skewed[:, ::2].square().sum() < 0.8 * even[:, ::2].square().sum()


def test_method_quantizes_without_statistics():
    method = KQuants()
    assert (method.name, method.calibrated) == ("kquants", False)
    expert = Expert(name="kq", method="kquants", scheme="q4_k")
    tensor = method.quantize(gaussian(2, 256), None, SCHEMES["q4_k"], expert, torch.bfloat16, {})
    assert tensor.scheme is SCHEMES["q4_k"]
    assert tensor.fields["d"].dtype == torch.float16


def test_method_supports_block_schemes_only():
    method = KQuants()
    for name, scheme in SCHEMES.items():
        assert (method.supports(scheme) == "") == scheme.is_block, name
    assert "q4_k" in method.supports(SCHEMES["w4a16"])
    assert method.supports(BLOCK_SCHEMES["Q5_1"]) != ""
