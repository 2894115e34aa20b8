"""The sample that advice rests on: documents cut into three roles, windows told apart by domain or cluster."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moqe.data.documents import Document
from moqe.data.partition import distinct, split_documents, spread
from moqe.data.samples import TextSamples
from moqe.data.sources import read_source
from moqe.data.windows import pack_windows
from moqe.errors import DataError
from moqe.models.clusters import text_clusters
from moqe.progress import Progress
from moqe.recipe import Source
from moqe.router.examples import RoutingExamples
from moqe.router.features import TokenFeatures
from moqe.router.linear import fit_linear

DOCUMENTS_PER_SOURCE = 600  # read at most, so that a hub's data set is not streamed to its end
DOCUMENTS_PER_DOMAIN = 6  # at least, two in each role
JUDGING_SHARE, CHOICE_SHARE = 0.35, 0.25
PREFIX = 64  # tokens of a window that the router sees, at most a quarter of the window
_PER_CLUSTER = 6  # calibration windows that a cluster should have


@dataclass(frozen=True)
class AdviceSamples:
    """Windows of three disjoint sets of documents, the label of a window being its `domain`.

    calibration: statistics and distillation. choice: who serves what. judging: what is reported.
    """

    calibration: TextSamples
    choice: TextSamples
    judging: TextSamples

    @property
    def labels(self) -> tuple[str, ...]:
        """Domains or clusters, in the order of the calibration windows."""
        return tuple(dict.fromkeys(self.calibration.domain))

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Windows of calibration, choice and judging."""
        return len(self.calibration), len(self.choice), len(self.judging)

    @property
    def scored(self) -> TextSamples:
        """The choice windows followed by the judging windows."""
        return TextSamples(
            torch.cat([self.choice.tokens, self.judging.tokens]),
            self.choice.document + self.judging.document,
            self.choice.domain + self.judging.domain,
            self.choice.text_bytes + self.judging.text_bytes,
        )


def parse_source(text: str | Source) -> Source:
    """A source written as `path` or `path=domain`."""
    if isinstance(text, Source):
        return text
    path, equals, domain = text.rpartition("=")
    if not equals or Path(text).expanduser().exists():
        return Source(path=text, max_documents=DOCUMENTS_PER_SOURCE)
    return Source(path=path, domain=domain, max_documents=DOCUMENTS_PER_SOURCE)


def read_samples(
    sources: Sequence[Source], tokenizer: Any, window: int, most: tuple[int, int, int], seed: int, progress: Progress
) -> AdviceSamples:
    """Read sources and cut them into windows of calibration, choice and judging, at most so many of each.

    Raises DataError for a domain with fewer than DOCUMENTS_PER_DOMAIN documents or a role that does not fill a window.
    """
    documents: list[Document] = []
    with progress.track("read texts", len(sources)) as advance:
        for source in sources:
            documents += read_source(source)
            advance(1)
    documents = distinct("data", documents)
    for domain, count in Counter(document.domain for document in documents).items():
        if count < DOCUMENTS_PER_DOMAIN:
            raise DataError(
                f"domain {domain!r} has {count} documents, and advice needs {DOCUMENTS_PER_DOMAIN} (two each to "
                "calibrate, to choose and to judge): add documents, each a row of .jsonl or .parquet or a file"
            )
    rest, judging = split_documents(documents, JUDGING_SHARE, seed)
    calibration, choice = split_documents(rest, CHOICE_SHARE / (1 - JUDGING_SHARE), seed)
    roles = {"calibration": calibration, "choice": choice, "judging": judging}
    packed = []
    with progress.track("cut texts into windows", len(documents)) as advance:
        for (role, members), limit in zip(roles.items(), most, strict=True):
            try:
                packed.append(pack_windows(members, tokenizer, window, limit, seed, advance))
            except DataError as error:
                short = str(error).partition(":")[0]
                raise DataError(f"{role} documents: {short}: add documents or choose a shorter window") from None
    return AdviceSamples(*packed)


def thinned(samples: AdviceSamples, wanted: tuple[int, int, int], seed: int) -> AdviceSamples:
    """At most so many windows of calibration, choice and judging, spread evenly over labels and documents."""
    parts = (samples.calibration, samples.choice, samples.judging)
    return AdviceSamples(
        *(
            part.select(spread(list(zip(part.domain, part.document, strict=True)), limit, seed))
            for part, limit in zip(parts, wanted, strict=True)
        )
    )


def clustered(samples: AdviceSamples, embedding: Tensor, wanted: int, seed: int) -> AdviceSamples:
    """The same windows labelled by cluster: k-means on the calibration windows, nearest centre for the others.

    At least two clusters, and at most `wanted` or as many as there are windows for. Raises DataError as k-means does.
    """
    count = max(2, min(wanted, len(samples.calibration) // _PER_CLUSTER))
    found = np.array(text_clusters(samples.calibration.tokens, embedding, count, seed))
    means = TokenFeatures(samples.calibration.tokens, embedding).pooled().double()
    centres = torch.stack([means[torch.from_numpy(found == cluster)].mean(0) for cluster in range(count)])

    def labelled(part: TextSamples) -> TextSamples:
        pooled = TokenFeatures(part.tokens, embedding).pooled().double()
        nearest = torch.cdist(pooled, centres.to(pooled.device)).argmin(1).tolist()
        return replace(part, domain=tuple(f"cluster-{cluster + 1}" for cluster in nearest))

    calibration = replace(samples.calibration, domain=tuple(f"cluster-{cluster + 1}" for cluster in found.tolist()))
    return AdviceSamples(calibration, labelled(samples.choice), labelled(samples.judging))


def routed_labels(samples: AdviceSamples, tokens: Tensor, embedding: Tensor) -> NDArray[np.str_]:
    """The label that a linear router gives each window of `tokens`, (n, t), from its first `router_tokens`.

    Ridge regression on mean embeddings, fitted to the labels of the calibration windows; its strength is the best on
    the choice windows. Labels cost no forward pass, so they teach a small sample more than measured losses would.
    """
    seen, labels = router_tokens(tokens.shape[1]), samples.labels

    def examples(part: TextSamples) -> RoutingExamples:
        wrong = torch.tensor([[float(label != own) for label in labels] for own in part.domain])
        return RoutingExamples(TokenFeatures(part.tokens[:, :seen], embedding), wrong, part.document)

    router = fit_linear(examples(samples.calibration), examples(samples.choice))
    predicted = router.predict(TokenFeatures(tokens[:, :seen], embedding)).argmin(1).tolist()
    return np.array([labels[index] for index in predicted])


def router_tokens(window: int) -> int:
    """How many first tokens of a window the router sees."""
    return max(1, min(PREFIX, window // 4))
