"""An expert as a model whose scales can be trained, on the skeleton that all experts of a mixture share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moqe.errors import CheckpointError
from moqe.formats.expert_files import ExpertFiles
from moqe.formats.safetensors_folder import in_block
from moqe.methods.distill.scaled_linear import ScaledLinear
from moqe.methods.distill.scales import scale_form, with_scales
from moqe.models.head import refuse_changed_logits
from moqe.models.shared import share
from moqe.models.skeleton import assign, find_blocks
from moqe.quantized import Quantized

MOST_KEPT = 2 << 30  # bytes that all blocks may keep for the backward pass


class Student:
    """An expert's blocks with fixed codes and trainable scales.

    skeleton: the model around the blocks, float32; it is not changed. files: the expert. norms: train the weights of
    norms as well. Memory: a byte a weight (two for codes outside -128..127), and what blocks keep for the backward pass
    where that is at most `most_kept` bytes in all; else every block is run again in the backward pass, so that one
    block's is in memory at a time. The results are the same.
    Raises CheckpointError when the expert does not fit the skeleton or has nothing to train.
    """

    def __init__(
        self, skeleton: nn.Module, files: ExpertFiles, *, norms: bool = False, most_kept: int = MOST_KEPT
    ) -> None:
        model: Any = share(skeleton)
        self.model, self.files = model, files
        self.device = next(tensor.device for tensor in skeleton.parameters() if not tensor.is_meta)
        self.vocabulary = int(model.get_output_embeddings().weight.shape[0])
        _, blocks = find_blocks(model)
        self.linears: dict[str, ScaledLinear] = {}
        self.norms: dict[str, nn.Parameter] = {}
        self._heads: dict[torch.dtype, Tensor] = {}
        for name in files.names():
            if in_block(name):
                self._place(name, norms)
        if not self.linears:
            raise CheckpointError("the expert has no quantized linear: there are no scales to train")
        refuse_changed_logits(model)
        keeping = Keeping(len(blocks), most_kept)
        for index, block in enumerate(blocks):
            blocks[index] = _Checkpointed(block, keeping)

    def _place(self, name: str, norms: bool) -> None:
        value = self.files.load(name)
        path, _, leaf = name.rpartition(".")
        if isinstance(value, Tensor):
            trained = norms and value.dim() == 1 and leaf == "weight"
            assign(self.model, name, value.to(self.device, torch.float32))
            if trained:
                self.norms[name] = self.model.get_submodule(path).get_parameter(leaf).requires_grad_(True)
            return
        old: Any = self.model.get_submodule(path)
        bias = None
        if old.bias is not None:
            stored = self.files.load(f"{path}.bias")
            assert isinstance(stored, Tensor)
            bias = stored.to(self.device, torch.float32)
        linear = ScaledLinear(scale_form(value), bias, self.files.activation_bits(name)).to(self.device)
        parent, _, child = path.rpartition(".")
        setattr(self.model.get_submodule(parent), child, linear)
        self.linears[name] = linear

    def parameters(self) -> dict[str, nn.Parameter]:
        """What is trained, by name: `<weight>.log_scale`, `<weight>.shift`, `<norm>`."""
        found = {
            f"{name}.{part}": parameter
            for name, linear in self.linears.items()
            for part, parameter in linear.named_parameters()
        }
        return found | self.norms

    def hidden(self, tokens: Tensor) -> Tensor:
        """Normalised hidden states, (n, t, hidden), of tokens, int64 (n, t)."""
        states: Tensor = self.model.base_model(input_ids=tokens.to(self.device), use_cache=False).last_hidden_state
        return states

    def head(self, hidden: Tensor) -> Tensor:
        """Logits, (..., vocabulary). Under autocast in its type, of weights that are rounded to it once."""
        head, kind = self.model.get_output_embeddings(), self.device.type
        if not torch.is_autocast_enabled(kind):
            logits: Tensor = head(hidden)
            return logits
        dtype = torch.get_autocast_dtype(kind)
        if dtype not in self._heads:
            self._heads[dtype] = head.weight.detach().to(dtype)
        return nn.functional.linear(hidden, self._heads[dtype], head.bias)

    def state(self) -> dict[str, Tensor]:
        """What was trained, as tensors that `load_state` takes."""
        return {name: parameter.detach().clone() for name, parameter in self.parameters().items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go back to a state of this expert, or of one with the same codes. An empty one is the untrained state."""
        with torch.no_grad():
            for name, parameter in self.parameters().items():
                if name in state:
                    parameter.copy_(state[name])
                elif name in self.norms:
                    value = self.files.load(name)
                    assert isinstance(value, Tensor)
                    parameter.copy_(value)
                else:
                    parameter.zero_()

    @torch.no_grad()
    def tensors(self) -> dict[str, Quantized | Tensor]:
        """Every parameter of the blocks as the expert would store it now, by name."""
        found: dict[str, Quantized | Tensor] = {}
        for name in self.files.names():
            if not in_block(name):
                continue
            value = self.files.load(name)
            if not isinstance(value, Tensor):
                scale, offset = self.linears[name].current()
                found[name] = with_scales(value, scale.cpu(), None if offset is None else offset.cpu())
            elif name in self.norms:
                found[name] = self.norms[name].detach().to("cpu", value.dtype)
            else:
                found[name] = value
        return found


class Keeping:
    """Whether blocks keep what their backward pass needs, which the first of them to run tells."""

    def __init__(self, blocks: int, most: int) -> None:
        self.blocks, self.most = blocks, most
        self.kept: bool | None = None

    def decide(self, run: Callable[[], object], own: Iterable[Tensor]) -> bool:
        """Keep, if all blocks keep at most `most` bytes. run: the block. own: what it has in memory anyway."""
        if self.kept is None:
            sizes: dict[int, int] = {}

            def saved(tensor: Tensor) -> Tensor:
                storage = tensor.untyped_storage()
                sizes[storage.data_ptr()] = storage.nbytes()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(saved, lambda tensor: tensor):
                made = run()  # alive while bytes are counted: no storage is counted under another's address
            for tensor in own:
                sizes.pop(tensor.untyped_storage().data_ptr(), None)
            self.kept = self.blocks * sum(sizes.values()) <= self.most
            del made
        return self.kept


class _Checkpointed(nn.Module):
    """A block that keeps what its backward pass needs, or is run again for it."""

    def __init__(self, block: nn.Module, keeping: Keeping) -> None:
        super().__init__()
        self.block, self.keeping = block, keeping

    def __getattr__(self, name: str) -> Any:
        # Some decoders read an attribute of their blocks, such as `attention_type`.
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        run = partial(self.block, *args, **kwargs)
        if not torch.is_grad_enabled():
            return run()
        own = (*self.block.parameters(), *self.block.buffers())
        return run() if self.keeping.decide(run, own) else checkpoint(run, use_reentrant=False)
