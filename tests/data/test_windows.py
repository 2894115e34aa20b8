from __future__ import annotations

import logging
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moqe.data.documents import Document
from moqe.data.windows import begin_token, pack_windows, text_bytes
from moqe.errors import DataError

WINDOW, BOS, EOS = 16, 256, 257
TEXTS = st.text(st.characters(min_codepoint=32, max_codepoint=0x2FF), max_size=60)
CORPORA = st.lists(st.tuples(TEXTS, st.sampled_from(["a", "b"])), min_size=1, max_size=12)


def documents_of(corpus: list[tuple[str, str]]) -> list[Document]:
    """The corpus, each text marked by its domain so that no two are equal, and enough in each domain for a window."""
    unique = dict.fromkeys((domain + text, domain) for text, domain in corpus)
    filler = [(domain * 3 * WINDOW, domain) for domain in dict.fromkeys(domain for _, domain in unique)]
    return [Document(text, domain, str(i)) for i, (text, domain) in enumerate([*unique, *filler])]


@settings(max_examples=30, deadline=None)
@given(CORPORA)
def test_windows_are_full_and_hold_the_text_in_order(plain_tokenizer, corpus):
    documents = documents_of(corpus)
    samples = pack_windows(documents, plain_tokenizer, WINDOW)
    assert samples.tokens.shape == (len(samples), WINDOW)
    assert samples.tokens.dtype == torch.int64
    encoded = {d.digest: plain_tokenizer(d.text, add_special_tokens=False)["input_ids"] for d in documents}
    whole = {document: ids for document, ids in encoded.items() if len(ids) >= WINDOW}
    for name in dict.fromkeys(samples.document):
        rows = [i for i, owner in enumerate(samples.document) if owner == name]
        assert rows == list(range(rows[0], rows[-1] + 1))
        joined = samples.tokens[rows].flatten().tolist()
        if name in whole:
            assert joined == whole[name][: len(joined)]
            assert len(whole[name]) - len(joined) < WINDOW
        else:  # short documents end to end: every piece between end tokens is a whole one, save the cut last
            pieces = "".join(chr(i) for i in joined).split(chr(EOS))
            known = {"".join(chr(i) for i in ids) for ids in encoded.values()}
            assert all(piece in known for piece in pieces[:-1])
            assert any(text.startswith(pieces[-1]) for text in known)


@settings(max_examples=30, deadline=None)
@given(CORPORA)
def test_no_pack_mixes_domains(plain_tokenizer, corpus):
    documents = documents_of(corpus)
    samples = pack_windows(documents, plain_tokenizer, WINDOW)
    assert set(zip(samples.document, samples.domain, strict=True)) >= {
        (document.digest, document.domain) for document in documents if len(document.text.encode()) >= 2 * WINDOW
    }
    for text, domain in zip(plain_tokenizer.batch_decode(samples.tokens), samples.domain, strict=True):
        first = {piece[0] for piece in text.split("</s>")[1:] if piece}
        assert first <= {domain}
    assert len(set(samples.document)) == len(set(zip(samples.document, samples.domain, strict=True)))


@settings(max_examples=25, deadline=None)
@given(CORPORA)
def test_each_window_begins_with_the_only_bos(bos_tokenizer, corpus):
    samples = pack_windows(documents_of([(f"<s>{text}", domain) for text, domain in corpus]), bos_tokenizer, WINDOW)
    assert samples.tokens.shape == (len(samples), WINDOW)
    assert (samples.tokens[:, 0] == BOS).all()
    assert not (samples.tokens[:, 1:] == BOS).any()


def test_bos_only_where_the_tokenizer_adds_it(plain_tokenizer, bos_tokenizer):
    assert begin_token(plain_tokenizer) == []
    assert begin_token(bos_tokenizer) == [BOS]


def test_short_documents_are_joined_by_end_of_text(plain_tokenizer):
    documents = [Document(letter * 6, "d", letter) for letter in "abc"]
    samples = pack_windows(documents, plain_tokenizer, WINDOW)
    assert len(samples) == 1
    assert plain_tokenizer.decode(samples.tokens[0]) == "aaaaaa</s>bbbbbb</s>cc"
    assert samples.text_bytes == (14,)


def test_without_end_of_text_documents_touch(endless_tokenizer):
    documents = [Document(letter * 6, "d", letter) for letter in "abc"]
    samples = pack_windows(documents, endless_tokenizer, WINDOW)
    assert endless_tokenizer.decode(samples.tokens[0]) == "aaaaaabbbbbbcccc"


def test_the_tail_of_a_pack_is_dropped_and_the_next_document_starts_a_window(plain_tokenizer):
    documents = [Document("a" * (2 * WINDOW - 1), "d", "a"), Document("b" * WINDOW, "d", "b")]
    samples = pack_windows(documents, plain_tokenizer, WINDOW)
    assert [plain_tokenizer.decode(row) for row in samples.tokens] == ["a" * WINDOW, "b" * WINDOW]
    assert samples.document == tuple(document.digest for document in documents)


def test_a_spelt_out_special_token_is_text(plain_tokenizer):
    samples = pack_windows([Document("</s>" * WINDOW, "d", "n")], plain_tokenizer, WINDOW)
    assert EOS not in samples.tokens


def test_text_bytes_counts_utf8_without_special_tokens(plain_tokenizer):
    ids = plain_tokenizer("né🙂")["input_ids"]
    assert text_bytes(torch.tensor([[BOS, *ids, EOS]]), plain_tokenizer) == (7,)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 60), st.integers(0, 3))
def test_max_samples_spreads_over_domains_and_packs(plain_tokenizer, wanted, seed):
    sizes = {"a": [20, 1, 1], "b": [2], "c": [5, 5]}  # windows of each document
    documents = [
        Document(f"{domain}{i}" * (count * WINDOW // 2), domain, "")
        for domain, counts in sizes.items()
        for i, count in enumerate(counts)
    ]
    samples = pack_windows(documents, plain_tokenizer, WINDOW, wanted, seed)
    assert len(samples) == min(wanted, 34)
    by_domain = Counter(samples.domain)
    for domain, counts in sizes.items():  # none gets less than an even share unless it has no more
        assert by_domain[domain] >= min(sum(counts), wanted // 3)
    by_pack = Counter(samples.document)
    big, *small = (by_pack[document.digest] for document in documents[:3])
    assert small == [1, 1] or big <= 1
    repeated = pack_windows(documents, plain_tokenizer, WINDOW, wanted, seed)
    assert repeated.digest == samples.digest
    everything = {tuple(row) for row in pack_windows(documents, plain_tokenizer, WINDOW).tokens.tolist()}
    assert {tuple(row) for row in samples.tokens.tolist()} <= everything


def test_the_seed_chooses_the_samples(plain_tokenizer):
    documents = [Document(chr(97 + i) * WINDOW, "d", "") for i in range(20)]
    digests = {pack_windows(documents, plain_tokenizer, WINDOW, 5, seed).digest for seed in range(4)}
    assert len(digests) == 4


def test_no_more_documents_are_encoded_than_needed(plain_tokenizer, monkeypatch):
    seen = []
    original = type(plain_tokenizer).__call__

    def counting(self, text, **options):
        seen.extend(text if isinstance(text, list) else [])
        return original(self, text, **options)

    monkeypatch.setattr(type(plain_tokenizer), "__call__", counting)
    documents = [Document(f"{i:04}" * WINDOW, "d", "") for i in range(500)]
    pack_windows(documents, plain_tokenizer, WINDOW, 3)
    assert 3 <= len(seen) <= 100


def test_a_domain_that_fills_no_window_is_an_error(plain_tokenizer):
    documents = [Document("a" * 99, "long", ""), Document("b" * 5, "short", ""), Document("c" * 4, "short", "")]
    with pytest.raises(DataError, match=r"'short' has 9 tokens in 2 documents, and one window needs 16.*data\.window"):
        pack_windows(documents, plain_tokenizer, WINDOW)


def test_no_documents_is_an_error(plain_tokenizer):
    with pytest.raises(DataError, match="no documents, and one window needs 16 tokens"):
        pack_windows([], plain_tokenizer, WINDOW)


def test_left_over_documents_are_logged(plain_tokenizer, caplog):
    caplog.set_level(logging.DEBUG, "moqe")
    pack_windows([Document("a" * 99, "d", ""), Document("b" * 5, "d", "")], plain_tokenizer, WINDOW)
    assert "domain d: 5 tokens in 1 documents fill no window" in caplog.text


@pytest.mark.parametrize("limit", [None, 5])
def test_progress_counts_every_document_once(limit, plain_tokenizer):
    documents = [Document(f"{i} " * 40, "ab"[i % 2], "") for i in range(300)]
    told: list[int] = []
    pack_windows(documents, plain_tokenizer, WINDOW, limit, advance=told.append)
    assert sum(told) == 300
    assert len(told) > 2
    if limit is not None:
        assert told[-1] > 100  # what the limit leaves out is told of at once
