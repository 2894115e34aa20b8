"""Clusters of texts by their mean embedding, for specialists where nobody labelled the texts."""

from __future__ import annotations

import numpy as np
import torch
from scipy.cluster.vq import kmeans2
from torch import Tensor

from moqe.errors import DataError

_ROUNDS, _STARTS = 50, 10


def text_clusters(tokens: Tensor, embedding: Tensor, count: int, seed: int) -> list[int]:
    """The cluster, 0 to count - 1, of each window: the best of ten k-means (k-means++ starts) on mean embeddings.

    tokens: int64, (n, window). embedding: (vocabulary, dimension). Clusters are numbered by size, largest first.
    Raises DataError when k-means ends with fewer clusters than asked for.
    """
    means = torch.stack([embedding[row].float().mean(0) for row in tokens]).double()  # (n, dimension)
    points = (means - means.mean(0)).numpy()
    if len(set(map(bytes, points))) < count:
        raise DataError(f"the calibration windows are fewer than {count} different ones: lower specialists.count")
    random = np.random.default_rng(seed)
    tried = [kmeans2(points, count, iter=_ROUNDS, minit="++", rng=random) for _ in range(_STARTS)]
    _, label = min(tried, key=lambda found: float(np.square(points - found[0][found[1]]).sum()))
    found = torch.bincount(torch.from_numpy(label).long(), minlength=count)
    if not bool((found > 0).all()):
        raise DataError(
            f"the {len(tokens)} calibration windows fall into fewer than {count} clusters: lower specialists.count"
        )
    rank = torch.argsort(torch.argsort(found, descending=True, stable=True))
    return [int(rank[number]) for number in label]
