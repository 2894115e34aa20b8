from __future__ import annotations

import logging

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from moqe.data.documents import Document
from moqe.data.partition import split_documents
from moqe.data.splits import make_splits, tokenizer_digest
from moqe.errors import DataError
from moqe.recipe import Data, Source


def write(folder, name: str, letters: str) -> Source:
    path = folder / f"{name}.txt"
    path.write_text("\n\n".join(letter * 40 for letter in letters))
    return Source(path=str(path), domain="letters", separator="blank")


def data_of(folder, calibration: str = "abcd", router: str = "efghijkl", test: str = "mnop", **options) -> Data:
    return Data(
        calibration=(write(folder, "calibration", calibration),),
        router=(write(folder, "router", router),),
        test=(write(folder, "test", test),),
        window=16,
        **options,
    )


def test_the_four_sets_share_no_document_and_lose_none(tmp_path, plain_tokenizer):
    splits = make_splits(data_of(tmp_path), plain_tokenizer, seed=0)
    found = [set(part.document) for part in vars(splits).values()]
    assert [len(part) for part in found] == [4, 6, 2, 4]
    assert len(set.union(*found)) == 16


def test_seed_and_validation_share_decide_the_validation_set(tmp_path, plain_tokenizer):
    data = data_of(tmp_path)
    first = make_splits(data, plain_tokenizer, seed=0)
    assert make_splits(data, plain_tokenizer, seed=0) is not first
    assert make_splits(data, plain_tokenizer, seed=0).router_validation.digest == first.router_validation.digest
    assert len({make_splits(data, plain_tokenizer, seed=i).router_validation.digest for i in range(5)}) > 1
    halved = make_splits(data_of(tmp_path, validation_share=0.5), plain_tokenizer, seed=0)
    assert len(set(halved.router_validation.document)) == 4


def test_sample_limits(tmp_path, plain_tokenizer):
    data = data_of(tmp_path, calibration_samples=3, router_samples=8, test_samples=2)
    splits = make_splits(data, plain_tokenizer, seed=0)
    assert [len(part) for part in vars(splits).values()] == [3, 6, 2, 2]


@pytest.mark.parametrize(
    ("changed", "first", "second"),
    [
        ({"router": "efghijka"}, "calibration", "router"),
        ({"test": "mnoa"}, "calibration", "test"),
        ({"test": "mnoe"}, "router", "test"),
    ],
)
def test_a_document_in_two_splits_is_an_error(tmp_path, plain_tokenizer, changed, first, second):
    message = rf"two splits: .*{first}\.txt#0 \({first}\) and .*{second}\.txt#\d \({second}\)"
    with pytest.raises(DataError, match=message):
        make_splits(data_of(tmp_path, **changed), plain_tokenizer, seed=0)


def test_a_repeated_document_counts_once(tmp_path, plain_tokenizer, caplog):
    caplog.set_level(logging.WARNING, "moqe")
    splits = make_splits(data_of(tmp_path, calibration="abca"), plain_tokenizer, seed=0)
    assert len(splits.calibration) == 6
    assert "calibration.txt#3 repeats" in caplog.text


def test_too_little_data_names_the_set(tmp_path, plain_tokenizer):
    data = data_of(tmp_path)
    (tmp_path / "test.txt").write_text("short")
    with pytest.raises(DataError, match="test data: domain 'letters' has 5 tokens in 1 documents"):
        make_splits(data, plain_tokenizer, seed=0)


def test_one_router_document_cannot_be_divided(tmp_path, plain_tokenizer):
    with pytest.raises(DataError, match="has one router document"):
        make_splits(data_of(tmp_path, router="e"), plain_tokenizer, seed=0)


LENGTHS = st.lists(st.integers(1, 400), min_size=2, max_size=30)


@settings(max_examples=40, deadline=None)
@given(LENGTHS, LENGTHS, st.floats(0.05, 0.95), st.integers(0, 9))
def test_every_domain_is_divided_by_its_share(first, second, share, seed):
    documents = [
        Document(f"{domain}{i}".ljust(length, "."), domain, "")
        for domain, lengths in (("a", first), ("b", second))
        for i, length in enumerate(lengths)
    ]
    train, validation = split_documents(documents, share, seed)
    assert sorted([*train, *validation], key=documents.index) == documents
    for domain in "ab":
        sizes = [len(document.text) for document in validation if document.domain == domain]
        total = sum(len(document.text) for document in documents if document.domain == domain)
        assert sizes
        assert any(document.domain == domain for document in train)
        assert sum(sizes) <= share * total or len(sizes) == 1
    assert split_documents(documents[::-1], share, seed) == (train[::-1], validation[::-1])


def test_the_tokenizer_digest_names_the_vocabulary_and_the_rule(tmp_path, plain_tokenizer, bos_tokenizer):
    plain_tokenizer.save_pretrained(tmp_path)
    copy = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert tokenizer_digest(copy) == tokenizer_digest(plain_tokenizer)
    assert tokenizer_digest(bos_tokenizer) != tokenizer_digest(plain_tokenizer)
    copy.add_special_tokens({"additional_special_tokens": [AddedToken("<new>", special=True)]})
    assert tokenizer_digest(copy) != tokenizer_digest(plain_tokenizer)
