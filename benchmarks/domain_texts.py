"""Six domains of text, each cut into calibration, router and test documents that no two roles share.

WikiText-2, C4 and OpenWebText come with files of their own; code, mail and dialogue are taken from a corpus with the
columns `text`, `domain` and `source`. Neighbouring rows of one source are one document, because long documents were cut
into rows. A document's role is decided by its digest and a seed, so every seed tests on other documents.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from moqe.data.sources import read_source
from moqe.recipe import Source

ROLES = ("calibration", "router", "test")
FROM_CORPUS = ("code", "mail", "dialogue")
DOMAINS = ("wikitext2", "c4", "openwebtext", *FROM_CORPUS)
SHARES = (0.4, 0.35, 0.25)


def write_domain_texts(texts: Path, corpus: Path, folder: Path, seed: int) -> None:
    """Write `<folder>/<domain>-<role>.parquet` with the column `text`, unless it is there.

    texts: the folder of the three corpora. corpus: the parquet file of the other domains.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if all((folder / f"{domain}-{role}.parquet").exists() for domain in DOMAINS for role in ROLES):
        return
    found = {
        "wikitext2": _documents(texts, "wikitext2_raw_train_first1mb.txt", "wikitext2_raw_valid.txt"),
        "c4": _documents(texts, "c4_train.parquet", "c4_eval.parquet"),
        "openwebtext": _documents(texts, "openwebtext_train.parquet", "openwebtext_eval.parquet"),
        **dict(_corpus(corpus)),
    }
    for domain in DOMAINS:
        documents = sorted(set(found[domain]))
        order = np.random.default_rng([seed, DOMAINS.index(domain)]).permutation(len(documents))
        borders = np.cumsum([round(share * len(documents)) for share in SHARES[:-1]])
        for role, rows in zip(ROLES, np.split(order, borders), strict=True):
            table = pa.table({"text": [documents[row] for row in rows]})
            pq.write_table(table, folder / f"{domain}-{role}.parquet")


def _documents(folder: Path, *names: str) -> list[str]:
    """Documents of files, WikiText's articles one each."""
    found: list[str] = []
    for name in names:
        separator = "wikitext" if name.endswith(".txt") else "none"
        found += [document.text for document in read_source(Source(path=str(folder / name), separator=separator))]
    return found


def _corpus(path: Path) -> Iterator[tuple[str, Sequence[str]]]:
    """Domain and documents: neighbouring rows of one source joined."""
    columns = pq.read_table(path, columns=["domain", "source", "text"]).to_pydict()
    rows = zip(columns["domain"], columns["source"], columns["text"], strict=True)
    joined = [
        (domain, "\n\n".join(text for _, _, text in group))
        for (domain, _), group in itertools.groupby(rows, key=lambda row: row[:2])
    ]
    for domain in FROM_CORPUS:
        yield domain, [text for name, text in joined if name == domain]
