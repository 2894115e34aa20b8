"""ONNX Runtime: image classifiers as a server runs them, int8 layers in integers.

What the file says is done in the engine's own order. A convolution between two quantizers becomes one integer kernel,
its bias rounded to int32 (in steps of input scale times weight scale) and its sum rescaled in float32: before rounding
to codes, results differ from the reference runtime's by float32 rounding and by that bias. An activation close to the
middle between two codes may get the other one. `executed` counts what runs as integers and what does not.

Processors of the x86 family without VNNI add pairs of products in 16 bits, which overflow; there ONNX Runtime is told
to take its slower and exact kernels.

Cost: the file's bytes in memory, plus float32 copies of weights that no integer kernel takes.
"""

from __future__ import annotations

import importlib
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moqe.errors import CheckpointError, DataError, MissingExtra, NumericalError
from moqe.formats.onnx_graph import require_onnx
from moqe.models.processor import has_vnni

INTEGER_PRODUCTS = frozenset(
    {"QLinearConv", "ConvInteger", "QGemm", "QLinearMatMul", "MatMulInteger", "MatMulIntegerToFloat"}
)
FLOAT_PRODUCTS = frozenset({"Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul"})
_ERRORS_ONLY = 3  # ONNX Runtime's log severity


class OnnxRuntime:
    """Runs one ONNX classifier on the CPU. Safe to share between threads.

    path: the file. threads: of one forward pass; 0 takes all processors. max_batch: images in one forward pass.
    Raises CheckpointError when the file cannot be loaded, MissingExtra without the package onnxruntime.
    """

    name = "onnxruntime"

    def __init__(self, path: Path, threads: int = 0, *, max_batch: int = 64) -> None:
        self.path, self.threads, self.max_batch = path, threads, max_batch
        self._session = _session(path, threads)
        (self._input,), (self._output,) = self._session.get_inputs(), self._session.get_outputs()

    @property
    def image_shape(self) -> tuple[int, ...]:
        """The shape of one input: channels, height and width of an image, (3, h, w), or a router's (features,)."""
        return tuple(int(size) for size in self._input.shape[1:])

    def logits(self, x: Tensor) -> Tensor:
        """Logits of preprocessed images: float32, (n, classes) on the CPU, for float32, (n, 3, h, w).

        Raises DataError for images of another shape, NumericalError when a logit is not finite.
        """
        if tuple(x.shape[1:]) != self.image_shape:
            expected = ", ".join(["n", *map(str, self.image_shape)])
            raise DataError(f"{self.path} takes images of shape ({expected}), not {tuple(x.shape)}")
        images = x.detach().to("cpu", torch.float32)
        parts = [self._run(part) for part in torch.split(images, self.max_batch) if len(part)]
        if not parts:
            return torch.empty(0, int(self._output.shape[-1]))
        result = torch.cat(parts)
        if not torch.isfinite(result).all():
            raise NumericalError(f"{self.path}: a logit is not finite; build this expert again or remove it")
        return result

    def _run(self, images: Tensor) -> Tensor:
        (logits,) = self._session.run([self._output.name], {self._input.name: images.contiguous().numpy()})
        return torch.from_numpy(logits)

    def executed(self) -> dict[str, int]:
        """How many products of layers run as integers and how many in float: {"integer": n, "float": m}.

        Counted in the graph as ONNX Runtime has optimized it for this processor. Raises MissingExtra without onnx.
        """
        onnx = require_onnx("looking into an optimized graph")
        with tempfile.TemporaryDirectory() as folder:
            optimized = Path(folder) / "optimized.onnx"
            _session(self.path, self.threads, optimized)
            operators = [node.op_type for node in onnx.load(str(optimized)).graph.node]
        return {
            "integer": sum(operator in INTEGER_PRODUCTS for operator in operators),
            "float": sum(operator in FLOAT_PRODUCTS for operator in operators),
        }


def require_onnxruntime(purpose: str) -> Any:
    """The package onnxruntime. Raises MissingExtra when it is not installed."""
    try:
        return importlib.import_module("onnxruntime")
    except ModuleNotFoundError:
        raise MissingExtra("onnxruntime", "vision", purpose) from None


def _session(path: Path, threads: int, optimized: Path | None = None) -> Any:
    """A session with all graph optimizations; `optimized` is where to write the graph that they make."""
    onnxruntime = require_onnxruntime("running an ONNX expert")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = _ERRORS_ONLY
    if not has_vnni():
        options.add_session_config_entry("session.x64quantprecision", "1")
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist")
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions have no common base of their own
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path} cannot be run by ONNX Runtime: {reason}; delete it and build again") from error
