"""A decoder walked block by block, at most one block in memory at a time.

    decoder = Decoder.open("Qwen/Qwen3-0.6B")
    hidden = decoder.embed(tokens)
    for k, kwargs in enumerate(decoder.block_inputs(hidden)):
        hidden = decoder.run_block(decoder.load_block(k), hidden, kwargs)
        decoder.release_block(k)
    logits = decoder.logits(hidden)

Works for any causal LM of transformers whose blocks sit in one ModuleList and hold nn.Linear layers. Everything around
the blocks is the model's own forward (see `recorder`), so its logits are those of the whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moqe.errors import ModelError
from moqe.models.discovery import hidden_of
from moqe.models.recorder import Recorder, recorders
from moqe.models.skeleton import assign, build_skeleton, find_blocks, release
from moqe.models.weights import CheckpointWeights, Weights, ZeroWeights, read_config, resolve_base


class Decoder:
    """A causal LM whose weights stay on disk until a part of it is asked for.

    folder: where the model is. config: the model's config of transformers. block_names: full module names, e.g.
    `model.layers.0`. device, dtype: where and in which type parts are materialised.
    """

    def __init__(self, folder: Path, weights: Weights, device: str, dtype: torch.dtype) -> None:
        self.folder, self.weights, self.device, self.dtype = folder, weights, torch.device(device), dtype
        self.model = build_skeleton(folder, dtype)
        for name, buffer in list(self.model.named_buffers()):
            assign(self.model, name, buffer.to(self.device))
        self.config: Any = self.model.config
        prefix, self._blocks = find_blocks(self.model)
        self.block_names = tuple(f"{prefix}.{index}" for index in range(len(self._blocks)))
        self._embedding_path = self._path_of(self._model.get_input_embeddings())
        self._head_path = self._path_of(self._model.get_output_embeddings())
        self._surroundings_loaded = False
        self._as_tuple: bool | None = None  # whether the decoder expects tuples from its blocks: found by trying

    @classmethod
    def open(cls, base: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Decoder:
        """Open a base model: `bundled:<name>`, a folder, or a hub id.

        Raises ModelError when it cannot be found, read or walked, or when it is already quantized.
        """
        folder = resolve_base(base)
        read_config(folder)
        return cls(folder, CheckpointWeights(folder), device, dtype)

    @classmethod
    def dry(cls, base: str) -> Decoder:
        """A decoder with zeros for weights, from config.json alone: for shapes, groups and dry runs."""
        folder = resolve_base(base, weights=False)
        config = read_config(folder)
        stored = getattr(torch, str(config.get("dtype") or config.get("torch_dtype")), torch.float32)
        return cls(folder, ZeroWeights(stored), "cpu", torch.float32)

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer. Raises ModelError when the folder has none."""
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(self.folder)
        except (ValueError, OSError, KeyError, TypeError, ImportError) as error:
            raise ModelError(f"{self.folder} has no usable tokenizer ({error}): add its tokenizer.json") from error

    @property
    def number_of_blocks(self) -> int:
        """How many decoder blocks there are."""
        return len(self.block_names)

    @property
    def embedding_name(self) -> str:
        """Full name of the input embedding's weight."""
        return f"{self._embedding_path}.weight"

    @property
    def head_name(self) -> str:
        """Full name of the stored weight that makes logits: the embedding's where the config ties the two."""
        tied = getattr(self.config, "tie_word_embeddings", False)
        return self.embedding_name if tied else f"{self._head_path}.weight"

    @property
    def stored_dtype(self) -> torch.dtype:
        """The floating point type in which the base stores its blocks."""
        name, parameter = next(self._blocks[0].named_parameters())
        return self.weights.load(f"{self.block_names[0]}.{name}", tuple(parameter.shape)).dtype

    def block_parameters(self, index: int) -> dict[str, tuple[int, ...]]:
        """Shapes of a block's parameters by their full names; reads nothing."""
        block = self._blocks[index]
        return {f"{self.block_names[index]}.{name}": tuple(p.shape) for name, p in block.named_parameters()}

    def other_parameters(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters outside the blocks (embeddings, final norm, head unless tied) by full name."""
        inside = tuple(f"{name}." for name in self.block_names)
        shapes = {
            name: tuple(parameter.shape)
            for name, parameter in self.model.named_parameters(remove_duplicate=False)
            if not name.startswith(inside)
        }
        if self.head_name == self.embedding_name:
            shapes.pop(f"{self._head_path}.weight", None)
        return shapes

    def load_block(self, index: int) -> nn.Module:
        """Materialise block `index` on the device; the decoder keeps it until `release_block`.

        Raises ModelError for a missing or damaged parameter, NumericalError for one that is not finite.
        """
        self._load(self._blocks[index], self.block_names[index])
        return self._blocks[index]

    def release_block(self, index: int) -> None:
        """Forget a block's weights, and whatever was done to them."""
        release(self._blocks[index])

    def embedding(self) -> Tensor:
        """The input embedding as it is stored, (vocabulary, hidden)."""
        weight: Tensor = self._model.get_input_embeddings().weight
        return self.weights.load(self.embedding_name, tuple(weight.shape)).to(self.device)

    def embed(self, tokens: Tensor, batch_size: int = 8) -> Tensor:
        """Hidden states that enter the first block: int64 (n, t) -> (n, t, hidden). The embedding is dropped again."""
        embedding = self._model.get_input_embeddings()
        self._load(embedding, self._embedding_path)
        try:
            parts = [
                self._walk(input_ids=part.to(self.device))[0][0].hidden for part in torch.split(tokens, batch_size)
            ]
        finally:
            release(embedding)
        return torch.cat([part for part in parts if part is not None])

    def block_inputs(self, hidden: Tensor) -> list[Mapping[str, Any]]:
        """What the decoder passes to every block beside the hidden states, for hidden states of this shape.

        hidden: (batch, tokens, hidden). Masks and positions depend on the shape and the block, not on the values.
        """
        return [recorder.kwargs for recorder in self._walk(inputs_embeds=hidden)[0]]

    def run_block(self, block: nn.Module, hidden: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
        """One block's output hidden states, (batch, tokens, hidden)."""
        with torch.no_grad():
            return hidden_of(block(hidden, **kwargs))

    def logits(self, hidden: Tensor) -> Tensor:
        """Final norm and head on the last block's output: (batch, tokens, hidden) -> (batch, tokens, vocabulary)."""
        head: nn.Module = self._model.get_output_embeddings()
        if any(parameter.is_meta for parameter in head.parameters()):
            self._load(head, self._head_path)
        logits: Tensor = self._walk(inputs_embeds=hidden, last=hidden)[1].logits
        return logits

    def normalised(self, hidden: Tensor) -> Tensor:
        """What the head sees: the last block's output, (batch, tokens, hidden), after the final norm."""
        states: Tensor = self._walk(inputs_embeds=hidden, last=hidden, head=False)[1][0]
        return states

    def full(self) -> nn.Module:
        """The whole model in float32 on the device, loaded by transformers: for the reference runtime."""
        from transformers import AutoModelForCausalLM

        model: nn.Module = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32)
        return model.to(self.device).eval()

    @property
    def _model(self) -> Any:
        """The model, for methods that nn.Module does not declare."""
        return self.model

    def _walk(self, last: Tensor | None = None, head: bool = True, **inputs: Tensor) -> tuple[list[Recorder], Any]:
        """Run the model with recorders for blocks. With `last`, the last recorder answers that, and the head runs."""
        self._load_surroundings()
        if last is not None and self._as_tuple is None:
            self._walk(inputs_embeds=last)
        for as_tuple in (False, True) if self._as_tuple is None else (self._as_tuple,):
            answers: list[Callable[[Tensor], Any]] = [partial(_answer, as_tuple, None)] * (self.number_of_blocks - 1)
            answers.append(partial(_answer, as_tuple, last))
            runner = self.model if last is not None and head else self._model.get_decoder()
            with recorders(self._blocks, answers) as swapped, torch.no_grad():
                try:
                    output = runner(**inputs, use_cache=False)
                except _Unbatched:
                    continue
            shape = (output[0] if last is None else last).shape
            if all(recorder.hidden is not None and recorder.hidden.shape == shape for recorder in swapped):
                self._as_tuple = as_tuple
                return swapped, output
        raise ModelError(
            f"the blocks of {type(self.model).__name__} do not pass (batch, tokens, hidden) on: choose "
            "another base model"
        )

    def _load_surroundings(self) -> None:
        """Materialise what is outside the blocks and the two embeddings: the final norm, learned positions."""
        if self._surroundings_loaded:
            return
        lazy = (f"{self._embedding_path}.", f"{self._head_path}.")
        for name, shape in self.other_parameters().items():
            if not name.startswith(lazy):
                assign(self.model, name, self.weights.load(name, shape).to(self.device, self.dtype))
        self._surroundings_loaded = True

    def _load(self, module: nn.Module, prefix: str) -> None:
        """Materialise every parameter of a module."""
        for name, parameter in list(module.named_parameters()):
            full = f"{prefix}.{name}"
            stored = self.head_name if full == f"{self._head_path}.weight" else full
            assign(module, name, self.weights.load(stored, tuple(parameter.shape)).to(self.device, self.dtype))

    def _path_of(self, module: nn.Module | None) -> str:
        paths: list[str] = [path for path, other in self.model.named_modules() if other is module]
        if paths:
            return paths[0]
        raise ModelError(f"{type(self.model).__name__} has no input embedding or no head: choose another base model")


class _Unbatched(Exception):
    """A block's output reached the next one without its batch dimension: the decoder takes element 0 of a tuple."""


def _answer(as_tuple: bool, replacement: Tensor | None, hidden: Tensor) -> Any:
    if hidden.dim() != 3:
        raise _Unbatched
    answer = hidden if replacement is None else replacement
    return (answer,) if as_tuple else answer
