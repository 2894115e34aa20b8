"""A step after any method: train an expert's scales end to end against its base, integer codes fixed.

    student = Student(skeleton, files)
    distill(student, targets, windows, plan, ...)

Closed-form methods minimise every layer's own error. What counts is what the model says in the end, and there are few
enough scales (a hundredth of the weights) to train them on a few dozen windows without learning these by heart. Experts
that share their codes and differ in scales cost a few percent of a model each.

Related: Learned Step Size Quantization (Esser et al., ICLR 2020) trains scales with the weights; EfficientQAT (Chen et
al., 2024, section 3.3) trains scales alone, end to end, on labels. Here the target is the base's distribution over
tokens (Hinton et al. 2015, temperature 1), so the calibration text needs no labels and the optimum is the base itself.
"""

from __future__ import annotations

from moqe.methods.distill.cost import distill_seconds
from moqe.methods.distill.scales import ScaleForm, scale_form, with_scales
from moqe.methods.distill.student import Student
from moqe.methods.distill.targets import Targets
from moqe.methods.distill.training import Distilled, TrainingSet, distill, snapshot_path, window_schedule

__all__ = [
    "Distilled",
    "ScaleForm",
    "Student",
    "Targets",
    "TrainingSet",
    "distill",
    "distill_seconds",
    "scale_form",
    "snapshot_path",
    "window_schedule",
    "with_scales",
]
