"""What a classifier's answers are worth: top-1 and top-5 accuracy and cross-entropy of every sample.

A sample is right in top-k when fewer than k classes come before its own. Of equal classes the one with the lower number
comes first, as `argmax` has it. With five classes or fewer top-5 is always 1.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moqe.data.protocols import WHOLE, SampleLosses, Scored
from moqe.errors import NumericalError, ProtocolError

CLASS_METRICS = ("top1", "top5", "cross_entropy")
_LOWEST = float(np.finfo(np.float16).min)


def class_values(log_probabilities: NDArray[np.float64], label: NDArray[np.int64]) -> dict[str, NDArray[np.float64]]:
    """CLASS_METRICS of n answers, each (n,): 0 or 1 for the accuracies, nats for the cross-entropy.

    log_probabilities: (n, classes). label: true classes, (n,).
    """
    own = np.take_along_axis(log_probabilities, label[:, None], axis=1)  # (n, 1)
    earlier = np.arange(log_probabilities.shape[1])[None, :] < label[:, None]  # (n, classes)
    before = ((log_probabilities > own) | ((log_probabilities == own) & earlier)).sum(1)
    return {
        "top1": (before < 1).astype(np.float64),
        "top5": (before < 5).astype(np.float64),
        "cross_entropy": -own[:, 0],
    }


def score_classes(logits: Tensor, label: Tensor) -> Scored:
    """What a batch of logits is worth under the protocol `whole`, with the log-probabilities to keep.

    logits: (n, classes), any float type. label: int64, (n,). Raises NumericalError on a logit that is not finite,
    ProtocolError on a label that is no class of the model.
    """
    n, classes = logits.shape
    if not bool(torch.isfinite(logits).all()):
        row = int((~torch.isfinite(logits)).any(1).nonzero()[0])
        raise NumericalError(f"a logit of sample {row} of this batch is not finite: the expert's weights are damaged")
    if n and not 0 <= int(label.min()) <= int(label.max()) < classes:
        raise ProtocolError(
            f"labels run from {int(label.min())} to {int(label.max())} and the model has {classes} classes"
        )
    log_probabilities = logits.to("cpu", torch.float64).log_softmax(1).numpy()
    ones, nothing = np.ones(n, np.int64), np.zeros(n, np.int64)
    values = class_values(log_probabilities, label.cpu().numpy())
    losses = {name: SampleLosses(value, ones, np.zeros(n), nothing) for name, value in values.items()}
    return Scored({WHOLE: losses}, np.maximum(log_probabilities, _LOWEST).astype(np.float16))
