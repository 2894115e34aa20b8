"""Our searches against ggml's own, which the shared object of the xllamacpp wheel exports."""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType

import moqe.bundled
from moqe.formats.ggml_blocks import unpack
from moqe.methods.ggml_rounding import GRIDS
from moqe.methods.imatrix import imatrix
from moqe.methods.kquants import kquants
from moqe.schemes import SCHEMES, Scheme

TYPES = sorted(GRIDS)
MATRICES = ("gaussian", "student", "outliers", "trained")


@pytest.fixture(scope="module")
def ggml() -> ctypes.CDLL:
    found = importlib.util.find_spec("xllamacpp")
    if found is None or found.origin is None:
        pytest.skip("xllamacpp is not installed")
    library = ctypes.CDLL(str(next(Path(found.origin).parent.glob("xllamacpp*.so"))))
    address, count = ctypes.c_void_p, ctypes.c_int64
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, address, address, count, count, count, address]
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    return library


def quantize_by_ggml(
    library: ctypes.CDLL, weight: torch.Tensor, importance: torch.Tensor | None, scheme: Scheme
) -> torch.Tensor:
    rows, columns = weight.shape
    raw = torch.zeros(rows, columns // scheme.block_size * scheme.block_bytes, dtype=torch.uint8)
    size = library.ggml_quantize_chunk(
        int(GGMLQuantizationType[scheme.block]),
        weight.data_ptr(),
        raw.data_ptr(),
        0,
        rows,
        columns,
        None if importance is None else importance.data_ptr(),
    )
    assert size == raw.numel()
    return unpack(raw, scheme).dequantize()


@pytest.fixture(scope="module")
def matrices() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    gaussian = torch.randn(48, 512, generator=generator)
    chi_squared = torch.randn(3, 48, 512, generator=generator).square().sum(0)
    student = torch.randn(48, 512, generator=generator) / (chi_squared / 3).sqrt()
    outliers = torch.where(torch.rand(48, 512, generator=generator) < 0.005, gaussian * 20, gaussian)
    made = {"gaussian": gaussian * 0.02, "student": student * 0.02, "outliers": outliers * 0.02}
    model = Path(moqe.bundled.__file__).parent / "tiny-qwen3" / "model.safetensors"
    if model.exists():
        from safetensors import safe_open

        with safe_open(model, "pt") as tensors:
            trained = tensors.get_tensor("model.layers.1.mlp.up_proj.weight")
        made["trained"] = trained[:96].to(torch.float32).contiguous()
    return made


def matrix(matrices: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    if name not in matrices:
        pytest.skip("the bundled model has not been trained in this checkout")
    return matrices[name]


@pytest.mark.parametrize("scheme", TYPES)
@pytest.mark.parametrize("name", MATRICES)
def test_kquants_squared_error_is_at_most_ggmls(ggml, matrices, scheme, name):
    weight = matrix(matrices, name)
    ours = (kquants(weight, SCHEMES[scheme]).dequantize() - weight).square().sum()
    theirs = (quantize_by_ggml(ggml, weight, None, SCHEMES[scheme]) - weight).square().sum()
    assert ours <= 1.01 * theirs


@pytest.mark.parametrize("scheme", TYPES)
@pytest.mark.parametrize("name", MATRICES)
def test_imatrix_weighted_error_is_below_ggmls(ggml, matrices, scheme, name):
    weight = matrix(matrices, name)
    importance = torch.randn(weight.shape[1], generator=torch.Generator().manual_seed(1)).mul(1.5).exp()

    def error(result: torch.Tensor) -> torch.Tensor:
        return ((result - weight).square() * importance).sum()

    ours = error(imatrix(weight, importance, SCHEMES[scheme]).dequantize())
    assert ours <= error(quantize_by_ggml(ggml, weight, importance, SCHEMES[scheme]))


@pytest.mark.parametrize("scheme", [name for name in TYPES if name.endswith("_k")])
@pytest.mark.parametrize("name", ["gaussian", "trained"])
def test_kquants_error_weighted_as_in_ggml_is_comparable(ggml, matrices, scheme, name):
    """ggml without an importance matrix weighs by |w| (q2_k), w^2 (q3_k, q6_k) or r + |w| (q4_k, q5_k)."""
    weight = matrix(matrices, name)
    runs = weight.reshape(weight.shape[0], -1, 32)
    even = (runs.square().mean(-1, keepdim=True).sqrt() + runs.abs()).reshape(weight.shape)
    weighting = {"q2_k": weight.abs(), "q3_k": weight.square(), "q6_k": weight.square()}.get(scheme, even)

    def error(result: torch.Tensor) -> torch.Tensor:
        return ((result - weight).square() * weighting).sum()

    ours = error(kquants(weight, SCHEMES[scheme]).dequantize())
    assert ours <= 1.02 * error(quantize_by_ggml(ggml, weight, None, SCHEMES[scheme]))
