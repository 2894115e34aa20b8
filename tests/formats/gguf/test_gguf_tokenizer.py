"""llama.cpp cuts text as the Hugging Face tokenizer does, or the tokenizer is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from moqe.errors import ModelError
from moqe.formats.gguf_files import GgufFiles
from moqe.formats.gguf_tokenizer import pre_tokenizer, read_vocabulary, tokenizer_metadata

STRINGS = [
    "Hello world",
    " leading space and  two   three spaces \n\n\n lines\r\n\tand tabs ",
    "It's we'll THEY'VE DON'T o'clock 'quoted'",
    "1 12 123 1234 12345678 3.14159 0x7f",
    "def area(width, height):\n    return width * height  # no units\n",
    "Größe naïve 東京タワー Ελλάδα Привет ١٢٣ 😀👍🏽",
    "snake_case camelCase HTTPServer !!! ... --- (brackets) [x] {y}",
    "before<|endoftext|>after",
]
TEXT = ["the cat sat on the mat and the dog sat on the log, then they ate and sat again"] * 20
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)


def split(regex: str) -> pre_tokenizers.PreTokenizer:
    steps = [pre_tokenizers.Split(Regex(regex), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    return pre_tokenizers.Sequence(steps)


def digits() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)])


CUTTINGS: dict[str, tuple[Callable[[], pre_tokenizers.PreTokenizer], bool]] = {
    "gpt-2": (lambda: pre_tokenizers.ByteLevel(False), False),
    "smollm": (digits, False),
    "qwen2": (lambda: split(QWEN2), False),
    "llama-bpe": (lambda: split(LLAMA3), True),
    "dbrx": (lambda: split(LLAMA3), False),
    "tekken": (lambda: split(TEKKEN), True),
}


@pytest.mark.parametrize("name", CUTTINGS)
def test_llama_cpp_gives_the_same_tokens(
    name: str,
    make_base: Callable[..., Path],
    make_expert: Callable[..., Path],
    save_tokenizer: Callable[..., None],
    llama: Callable[[Path], Any],
) -> None:
    cutting, ignore_merges = CUTTINGS[name]
    base = make_base("llama")
    save_tokenizer(base, cutting(), ignore_merges=ignore_merges)
    assert pre_tokenizer(base) == name
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    engine = llama(make_expert(base))
    for text in STRINGS:
        assert engine.tokenize(text) == tokenizer.encode(text).ids, text


def save_sentencepiece(folder: Path, prepend: bool = True) -> None:
    """A BPE with byte fallback as converted from SentencePiece: every way to build a piece is a merge."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    from tokenizers import trainers

    trained.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=120, show_progress=False))
    pieces = sorted(trained.get_vocab().items(), key=lambda item: item[1])
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *(piece for piece, _ in pieces)]
    vocabulary = {piece: index for index, piece in enumerate(names)}
    merges = [
        (piece[:cut], piece[cut:])
        for piece, _ in pieces
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    model = models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    steps = [normalizers.Prepend("▁")] if prepend else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", vocabulary["<s>"])])
    saved = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    saved.save_pretrained(folder)


@pytest.mark.parametrize("prepend", [True, False])
def test_sentencepiece_tokens_are_the_same(
    prepend: bool, make_base: Callable[..., Path], make_expert: Callable[..., Path], llama: Callable[[Path], Any]
) -> None:
    base = make_base("mistral", sliding_window=None)
    save_sentencepiece(base, prepend)
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    engine = llama(make_expert(base))
    random = Random(0)
    jumbled = ["".join(random.choices("theanodsg ", k=40)) for _ in range(10)]  # where the order of merges matters
    for text in [*TEXT[:1], "the dog's log  123\n", "Größe 東京 😀", *jumbled]:
        assert engine.tokenize(text) == tokenizer.encode(text).ids, text


def edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_unknown_cutting_is_refused(tmp_path: Path, save_tokenizer: Callable[..., None]) -> None:
    save_tokenizer(tmp_path, split(r"\p{L}+|\p{N}+"))
    with pytest.raises(
        ModelError, match=r"no name for \(\\p\{L\}\+\|\\p\{N\}\+; normalizer NFC\): use an integer scheme"
    ):
        pre_tokenizer(tmp_path)


def test_unknown_normalizer_is_refused(tmp_path: Path, save_tokenizer: Callable[..., None]) -> None:
    save_tokenizer(tmp_path, split(QWEN2))
    edit(tmp_path, lambda content: content.update(normalizer={"type": "Lowercase"}))
    with pytest.raises(ModelError, match="normalizer Lowercase"):
        pre_tokenizer(tmp_path)


def test_trained_byte_fallback_merges_are_refused(tmp_path: Path) -> None:
    save_sentencepiece(tmp_path)
    edit(tmp_path, lambda content: content["model"]["merges"].pop())
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="would merge differently"):
        tokenizer_metadata(tmp_path, 512)


def test_more_tokens_than_embeddings_are_refused(tmp_path: Path, save_tokenizer: Callable[..., None]) -> None:
    save_tokenizer(tmp_path, split(QWEN2))
    with pytest.raises(ModelError, match="they must belong together"):
        tokenizer_metadata(tmp_path, 100)


def test_a_tokenizer_without_end_of_text_is_refused(tmp_path: Path, save_tokenizer: Callable[..., None]) -> None:
    save_tokenizer(tmp_path, split(QWEN2))
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="set eos_token"):
        tokenizer_metadata(tmp_path, 512)


def test_vocabulary_digest_ignores_padding_and_sees_another_vocabulary(
    make_base: Callable[..., Path], make_expert: Callable[..., Path], save_tokenizer: Callable[..., None]
) -> None:
    base = make_base("qwen3")
    written = GgufFiles(make_expert(base)).vocabulary()
    assert len(written.tokens) == 512
    assert written.digest == read_vocabulary(base).digest
    assert list(written.merges) == list(read_vocabulary(base).merges)
    save_tokenizer(base, split(LLAMA3), vocabulary=300)
    assert written.digest != read_vocabulary(base).digest
