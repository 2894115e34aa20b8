"""Methods that quantize image classifiers: convolutions and linears, weights and activations.

ptq     plain post-training quantization: the baseline
qat     Esser et al. 2020, arXiv 1902.08153: learned step size quantization
brecq   Li et al. 2021, arXiv 2102.05426: block reconstruction
n2uq    Liu et al. 2022, arXiv 2111.14826: learned thresholds, evenly spaced levels
dsconv  Gennari et al. 2019, arXiv 1901.01928: integer kernel blocks with float shifts, block floating point
"""

from __future__ import annotations

from moqe.methods.vision.brecq import Brecq
from moqe.methods.vision.dsconv import DsConv
from moqe.methods.vision.method import CalibrationImages, Job, VisionMethod, VisionResult
from moqe.methods.vision.n2uq import N2uq
from moqe.methods.vision.ptq import Ptq
from moqe.methods.vision.qat import Qat

VISION_METHODS: dict[str, VisionMethod] = {
    "ptq": Ptq(),
    "qat": Qat(),
    "brecq": Brecq(),
    "n2uq": N2uq(),
    "dsconv": DsConv(),
}

__all__ = ["VISION_METHODS", "CalibrationImages", "Job", "VisionMethod", "VisionResult"]
