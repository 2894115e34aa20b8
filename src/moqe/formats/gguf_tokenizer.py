"""A Hugging Face tokenizer as GGUF metadata, and the digest that tells two vocabularies apart.

Specification: ggml's docs/gguf.md, `tokenizer.ggml.*`. llama.cpp knows two kinds that matter for the families here:

`gpt2`  byte-level BPE. How text is cut before merging is not in the file: `tokenizer.ggml.pre` names one of the rules
        that llama.cpp has compiled in. The name is recognised from the pre-tokenizer's own regular expressions.
`llama` SentencePiece's BPE (Llama 2, Mistral): pieces with scores, the best scored pair is merged first. A
        `tokenizer.json` lists merges instead of scores; the two say the same only if every way to build a piece is
        listed and the merges of a piece stand together, which is checked.

Whatever llama.cpp would tokenize in another way is a ModelError: there is no `default` to fall back to. Known
difference: llama.cpp applies no Unicode normalization, so text that is not in NFC is cut differently there. MoQE itself
hands token ids to every runtime.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFValueType, TokenType
from tokenizers import Tokenizer

from moqe.errors import ModelError
from moqe.formats.gguf_container import Container, Value, array, boolean, string, uint32
from moqe.store import canonical_json, digest_bytes, read_json

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
)

# The steps of a pre-tokenizer before bytes are mapped, and `ignore_merges` -> llama.cpp's name for the same cutting.
PRE_TOKENIZERS: dict[tuple[tuple[str, ...], bool], str] = {
    ((_GPT2,), False): "gpt-2",
    (("digits", _GPT2), False): "smollm",
    ((_CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|" + _REST,), False): "qwen2",
    ((_CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + _REST,), True): "llama-bpe",
    ((_CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + _REST,), False): "dbrx",
    ((_CASED + r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",), True): "tekken",
}
SPACE = "\u2581"  # SentencePiece's mark of a space


@dataclass(frozen=True)
class Vocabulary:
    """Pieces in the order of their ids, each piece's type (GGUF's numbers), and BPE merges as `left right`."""

    tokens: Sequence[str]
    types: Sequence[int]
    merges: Sequence[str]

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that agree for two files of one vocabulary.

        Only ordinary pieces count: converters differ in how they write special tokens and padding. Merges do not count
        either, because GGUF's `llama` kind has none.
        """
        normal = [(i, token) for i, (token, kind) in enumerate(zip(self.tokens, self.types, strict=True)) if kind == 1]
        return digest_bytes(canonical_json(normal).encode("utf-8", "surrogateescape"))[:16]


def read_vocabulary(folder: Path) -> Vocabulary:
    """The vocabulary of a Hugging Face model folder. Raises ModelError when its tokenizer is no BPE."""
    content = _content(folder)
    model = content["model"]
    tokens = {int(index): str(token) for token, index in model["vocab"].items()}
    types = dict.fromkeys(tokens, int(TokenType.NORMAL))
    if model.get("byte_fallback"):
        types |= {model["vocab"][byte]: int(TokenType.BYTE) for byte in _byte_pieces() if byte in model["vocab"]}
    for added in content.get("added_tokens", []):
        tokens[added["id"]] = added["content"]
        types[added["id"]] = int(TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED)
    unknown = model.get("unk_token")
    if unknown in model["vocab"]:
        types[model["vocab"][unknown]] = int(TokenType.UNKNOWN)
    count = max(tokens) + 1
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return Vocabulary(
        [tokens.get(index, f"[PAD{index}]") for index in range(count)],
        [types.get(index, int(TokenType.UNUSED)) for index in range(count)],
        merges,
    )


def gguf_vocabulary(container: Container) -> Vocabulary:
    """The vocabulary of an opened GGUF file; empty when it has none."""
    lists = [
        container.metadata[key].value if key in container.metadata else []
        for key in ("tokenizer.ggml.tokens", "tokenizer.ggml.token_type", "tokenizer.ggml.merges")
    ]
    return Vocabulary(lists[0], lists[1] or [int(TokenType.NORMAL)] * len(lists[0]), lists[2])


def tokenizer_metadata(folder: Path, vocabulary_size: int) -> dict[str, Value]:
    """The `tokenizer.*` metadata of a Hugging Face model folder, padded to the `vocabulary_size` embedding rows.

    Raises ModelError when llama.cpp would tokenize differently, or the tokenizer has more tokens than the model.
    """
    content = _content(folder)
    vocabulary = read_vocabulary(folder)
    padding = vocabulary_size - len(vocabulary.tokens)
    if padding < 0:
        raise ModelError(
            f"{folder} has a tokenizer of {len(vocabulary.tokens)} tokens and embeddings of {vocabulary_size} rows: "
            "they must belong together"
        )
    tokens = [*vocabulary.tokens, *(f"[PAD{len(vocabulary.tokens) + i}]" for i in range(padding))]
    types = [*vocabulary.types, *[int(TokenType.UNUSED)] * padding]
    metadata = {
        "tokenizer.ggml.tokens": array(tokens, GGUFValueType.STRING),
        "tokenizer.ggml.token_type": array(types, GGUFValueType.INT32),
    }
    if content["model"].get("byte_fallback"):
        scores = [*_piece_scores(folder, content["model"], vocabulary), *[0.0] * padding]
        metadata |= {
            "tokenizer.ggml.model": string("llama"),
            "tokenizer.ggml.pre": string("default"),
            "tokenizer.ggml.scores": array(scores, GGUFValueType.FLOAT32),
            "tokenizer.ggml.add_space_prefix": boolean(_prefixes_space(folder, content)),
        }
    else:
        metadata |= {
            "tokenizer.ggml.model": string("gpt2"),
            "tokenizer.ggml.pre": string(pre_tokenizer(folder)),
            "tokenizer.ggml.merges": array(list(vocabulary.merges), GGUFValueType.STRING),
        }
    return metadata | _special_tokens(folder, vocabulary)


def pre_tokenizer(folder: Path) -> str:
    """llama.cpp's name for the way a byte-level BPE cuts text. Raises ModelError when it has none."""
    content = _content(folder)
    steps = content["pre_tokenizer"] or {}
    cutting: list[str] = []
    byte_level = False
    for step in steps.get("pretokenizers", [steps]):
        kind = step.get("type")
        if kind == "ByteLevel" and not step["add_prefix_space"]:
            byte_level = True
            cutting += [_GPT2] if step["use_regex"] else []
        elif kind == "Split" and step["behavior"] == "Isolated" and not step["invert"] and "Regex" in step["pattern"]:
            cutting.append(step["pattern"]["Regex"])
        elif kind == "Digits" and step["individual_digits"]:
            cutting.append("digits")
        else:
            cutting.append(canonical_json(step))
    name = PRE_TOKENIZERS.get((tuple(cutting), bool(content["model"].get("ignore_merges"))))
    normalizer = (content.get("normalizer") or {"type": "NFC"})["type"]
    if not byte_level or name is None or normalizer != "NFC":
        raise ModelError(
            f"{folder}/tokenizer.json cuts text in a way that llama.cpp has no name for ({' then '.join(cutting)}; "
            f"normalizer {normalizer}): use an integer scheme such as w4a16 for this model"
        )
    return name


def _content(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer.json"
    if not path.exists():
        raise ModelError(f"{folder} has no tokenizer.json: save the tokenizer with transformers' save_pretrained")
    content = read_json(path)
    if not isinstance(content, dict) or content.get("model", {}).get("type") != "BPE":
        raise ModelError(f"{path} is no BPE tokenizer, and MoQE writes no other into GGUF: use an integer scheme")
    return content


def _byte_pieces() -> list[str]:
    return [f"<0x{byte:02X}>" for byte in range(256)]


def _piece_scores(folder: Path, model: dict[str, Any], vocabulary: Vocabulary) -> list[float]:
    """Scores whose descending order is the order of the merges; 0 for pieces that no merge makes."""
    pairs = [merge.split(" ", 1) for merge in vocabulary.merges]
    listed = {(left, right) for left, right in pairs}
    rank: dict[str, int] = {}
    previous = ""
    for left, right in pairs:
        piece = left + right
        if piece in rank and piece != previous:
            raise _not_sentencepiece(folder, f"the merges that make {piece!r} do not stand together")
        rank.setdefault(piece, len(rank))
        previous = piece
    normal = [
        token for token, kind in zip(vocabulary.tokens, vocabulary.types, strict=True) if kind == TokenType.NORMAL
    ]
    for piece in normal:
        for cut in range(1, len(piece)):
            halves = piece[:cut], piece[cut:]
            if halves not in listed and halves[0] in model["vocab"] and halves[1] in model["vocab"]:
                raise _not_sentencepiece(folder, f"{piece!r} has no merge of {halves[0]!r} and {halves[1]!r}")
    return [-float(rank[token]) if token in rank else 0.0 for token in vocabulary.tokens]


def _not_sentencepiece(folder: Path, why: str) -> ModelError:
    return ModelError(
        f"{folder}/tokenizer.json is a byte-fallback BPE that llama.cpp would merge differently ({why}): use an "
        "integer scheme such as w4a16 for this model"
    )


def _prefixes_space(folder: Path, content: dict[str, Any]) -> bool:
    """Whether SentencePiece's dummy space is put before a text. Raises ModelError on any other preparation."""
    normalizer = content.get("normalizer") or {}
    cutting = content.get("pre_tokenizer") or {}
    replaced = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    steps = normalizer.get("normalizers", [normalizer] if normalizer else [])
    if not cutting and replaced in steps and all(s in (replaced, {"type": "Prepend", "prepend": SPACE}) for s in steps):
        return len(steps) == 2
    whole = (
        cutting.get("type") == "Metaspace" and cutting.get("replacement") == SPACE and not cutting.get("split", True)
    )
    if whole and not steps:
        return bool(cutting["prepend_scheme"] != "never")
    raise _not_sentencepiece(folder, "its text preparation is not SentencePiece's")


def _special_tokens(folder: Path, vocabulary: Vocabulary) -> dict[str, Value]:
    """Ids of the special tokens, whether they are added to a text, and the chat template."""
    config = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").exists() else {}
    model = read_json(folder / "config.json")
    index = {token: position for position, token in enumerate(vocabulary.tokens)}

    def token_id(kind: str) -> int | None:
        named = config.get(f"{kind}_token")
        text = named["content"] if isinstance(named, dict) else named
        if text in index:
            return index[text]
        fallback = model.get(f"{kind}_token_id")
        fallback = fallback[0] if isinstance(fallback, list) else fallback
        return fallback if isinstance(fallback, int) and 0 <= fallback < len(index) else None

    end = token_id("eos")
    if end is None:  # without one llama.cpp would take some ordinary token for the end of the text
        raise ModelError(f"{folder} names no end-of-text token: set eos_token in tokenizer_config.json")
    begin = token_id("bos")
    ids = {"bos": end if begin is None else begin, "eos": end, "unknown": token_id("unk"), "padding": token_id("pad")}
    metadata = {f"tokenizer.ggml.{kind}_token_id": uint32(value) for kind, value in ids.items() if value is not None}
    added = Tokenizer.from_file(str(folder / "tokenizer.json")).encode("").ids
    known: dict[tuple[int, ...], tuple[bool, bool]] = {
        (): (False, False),
        (ids["bos"] or 0,): (True, False),
        (ids["bos"] or 0, end): (True, True),
    }
    if tuple(added) not in known:
        raise ModelError(f"{folder}/tokenizer.json adds the tokens {added} to every text, which GGUF cannot say")
    begins, ends = known[tuple(added)]
    metadata |= {"tokenizer.ggml.add_bos_token": boolean(begins), "tokenizer.ggml.add_eos_token": boolean(ends)}
    template = folder / "chat_template.jinja"
    text = template.read_text(encoding="utf-8") if template.exists() else config.get("chat_template")
    if isinstance(text, str) and text:
        metadata["tokenizer.chat_template"] = string(text)
    return metadata
