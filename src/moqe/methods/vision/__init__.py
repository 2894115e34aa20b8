"""Methods that quantize image classifiers: convolutions and linears, weights and activations.

ptq     plain post-training quantization: the baseline
qat     Esser et al. 2020, arXiv 1902.08153: learned step size quantization
brecq   Li et al. 2021, arXiv 2102.05426: block reconstruction
"""

from __future__ import annotations

from moqe.methods.vision.brecq import Brecq
from moqe.methods.vision.method import CalibrationImages, VisionMethod, VisionResult
from moqe.methods.vision.ptq import Ptq
from moqe.methods.vision.qat import Qat

VISION_METHODS: dict[str, VisionMethod] = {
    "ptq": Ptq(),
    "qat": Qat(),
    "brecq": Brecq(),
}

__all__ = ["VISION_METHODS", "CalibrationImages", "VisionMethod", "VisionResult"]
