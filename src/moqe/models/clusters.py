"""Clusters of texts by mean embedding or of images by their features, without labels, and texts' telling words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch
from scipy.cluster.vq import kmeans2
from torch import Tensor

from moqe.errors import DataError

_ROUNDS, _STARTS = 50, 10


def text_clusters(tokens: Tensor, embedding: Tensor, count: int, seed: int) -> list[int]:
    """The cluster, 0 to count - 1, of each window, by its mean embedding; see `clusters`.

    tokens: int64, (n, window). embedding: (vocabulary, dimension).
    """
    means = torch.stack([embedding[row].float().mean(0) for row in tokens])  # (n, dimension)
    return clusters(means, count, seed, "calibration windows")


def clusters(vectors: Tensor, count: int, seed: int, what: str) -> list[int]:
    """The cluster, 0 to count - 1, of each vector: the best of ten k-means (k-means++ starts).

    vectors: (n, dimension). what: they stand for, in messages. Clusters are numbered by size, largest first.
    Raises DataError when k-means ends with fewer clusters than asked for.
    """
    means = vectors.double().cpu()
    points = (means - means.mean(0)).numpy()
    if len(set(map(bytes, points))) < count:
        raise DataError(f"the {what} are fewer than {count} different ones: lower specialists.count")
    random = np.random.default_rng(seed)
    tried = [kmeans2(points, count, iter=_ROUNDS, minit="++", rng=random) for _ in range(_STARTS)]
    _, label = min(tried, key=lambda found: float(np.square(points - found[0][found[1]]).sum()))
    found = torch.bincount(torch.from_numpy(label).long(), minlength=count)
    if not bool((found > 0).all()):
        raise DataError(f"the {len(points)} {what} fall into fewer than {count} clusters: lower specialists.count")
    rank = torch.argsort(torch.argsort(found, descending=True, stable=True))
    return [int(rank[number]) for number in label]


def telling_tokens(
    tokens: Tensor, inside: Sequence[bool], decode: Callable[[list[int]], str], count: int = 8
) -> list[str]:
    """The words that tell some windows from the others, the most telling first; empty where one side has no window.

    A token's log odds in the windows `inside` against the others, each count smoothed by the token's share of all text
    and divided by its standard deviation (Monroe, Colaresi and Quinn, "Fightin' Words", 2008, section 3.5). tokens:
    int64, (n, window). decode: one token's text; those without two letters in a row are left out.
    """
    chosen = torch.tensor(list(inside), dtype=torch.bool)
    if not bool(chosen.any()) or bool(chosen.all()):
        return []
    size = int(tokens.max()) + 1
    here, there = (torch.bincount(tokens[rows].flatten(), minlength=size).double() for rows in (chosen, ~chosen))
    prior = (here + there) * (0.1 * size / float(here.sum() + there.sum()))  # a tenth of a token for each known one
    kept = prior > 0
    odds = [
        torch.log((part + prior) / (part.sum() + prior.sum() - part - prior)).where(kept, torch.zeros(()).double())
        for part in (here, there)
    ]
    deviation = (1 / (here + prior).clamp_min(1e-9) + 1 / (there + prior).clamp_min(1e-9)).sqrt()
    order = torch.argsort((odds[0] - odds[1]) / deviation, descending=True, stable=True)
    words: dict[str, None] = {}
    for token in order.tolist():
        word = decode([token]).strip()
        if here[token] and any(a.isalpha() and b.isalpha() for a, b in pairwise(word)):
            words.setdefault(word)
        if len(words) == count:
            break
    return list(words)
