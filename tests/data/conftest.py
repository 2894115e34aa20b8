"""Byte tokenizers, made in memory: ids 0-255 are bytes, so that a test can read what a window holds."""

from __future__ import annotations

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())


def byte_tokenizer(*, bos: bool, eos: bool = True) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(vocab={character: i for i, character in enumerate(BYTES)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in ("<s>", "</s>")])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    names = {"bos_token": "<s>"} | ({"eos_token": "</s>"} if eos else {})
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


@pytest.fixture(scope="session")
def plain_tokenizer() -> PreTrainedTokenizerFast:
    """Adds nothing by itself, has an end-of-text token (257)."""
    return byte_tokenizer(bos=False)


@pytest.fixture(scope="session")
def bos_tokenizer() -> PreTrainedTokenizerFast:
    """Puts a beginning-of-text token (256) in front."""
    return byte_tokenizer(bos=True)


@pytest.fixture(scope="session")
def endless_tokenizer() -> PreTrainedTokenizerFast:
    """Has no end-of-text token."""
    return byte_tokenizer(bos=False, eos=False)
