"""From an expert's files to a decoder of packed linears, and what all experts of a mixture have in common."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from moqe.errors import CheckpointError, NumericalError
from moqe.formats.compressed_tensors_files import CompressedTensorsFiles
from moqe.formats.expert_files import ExpertFiles, PackedFiles
from moqe.formats.packed_tensor import PackedTensor
from moqe.formats.safetensors_folder import in_block
from moqe.formats.shared_codes import SharedCodes, identity
from moqe.models.skeleton import find_blocks
from moqe.progress import Advance, ignore
from moqe.runtimes.installation import stored_names
from moqe.runtimes.packed.block import Block, Shape, rotated_order
from moqe.runtimes.packed.decoder import Decoder, require_supported
from moqe.runtimes.packed.kernel import Choice, process_choice
from moqe.runtimes.packed.linear import PackedCodes, PackedLinear, Together, pack_kernels
from moqe.runtimes.packed.weight import GroupedWeight, Key, concatenated, grouped_weight


class PackedSkeleton:
    """The model around the blocks, and the codes that are packed now: one a mixture, for all its runtimes.

    model: a causal language model of transformers; its blocks may lie on the meta device. precision: float32 or
    bfloat16, see `PackedRuntime`. choice: which kernel is taken for how many rows. compiled: whether steps of decoding
    are compiled.
    Raises ModelError for a model that the packed decoder does not run.
    """

    def __init__(
        self, model: nn.Module, precision: torch.dtype, choice: Choice | None = None, compiled: bool = False
    ) -> None:
        self.model: Any = model
        require_supported(self.model.config)
        self.precision, self.compiled, self.codes = precision, compiled, PackedCodes()
        self.choice = choice or process_choice()
        self.shape = Shape.of(self.model.config)
        self._lock = threading.Lock()

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        device: torch.device = self.model.get_input_embeddings().weight.device
        return device

    def head(self) -> PackedLinear:
        """The head that experts share, made once."""
        with self._lock:
            return self._head

    @cached_property
    def _head(self) -> PackedLinear:
        return self.make_head(self.model.get_output_embeddings().weight.detach())

    def make_head(self, weight: Tensor) -> PackedLinear:
        """A head with another weight, float (vocabulary, hidden)."""
        bias = self.model.get_output_embeddings().bias
        return PackedLinear(pack_kernels(weight, self.precision, self.codes), bias, self.choice)


class PackedParts:
    """A decoder with its embedding and head, ready to run."""

    def __init__(
        self, skeleton: PackedSkeleton, expert: ExpertFiles | None, name: str, advance: Advance = ignore
    ) -> None:
        self._skeleton, self._expert, self._name, self._advance = skeleton, expert, name, advance
        self._parameters = dict(skeleton.model.named_parameters(remove_duplicate=False))
        self._stored = set() if expert is None else set(stored_names(self._parameters, expert, name))
        self._lease = SharedCodes(str(skeleton.device)).lease()
        self._keys = _code_keys(expert)
        self._linears: list[PackedLinear] = []
        model, precision = skeleton.model, skeleton.precision
        prefix, blocks = find_blocks(model)
        made = [self._block(f"{prefix}.{index}", block) for index, block in enumerate(blocks)]
        paths = {id(module): path for path, module in model.named_modules()}
        body = model.get_decoder()
        norm = self._floats(f"{paths[id(body.norm)]}.weight")
        self.decoder = Decoder(skeleton.shape, made, norm, body.rotary_emb, precision, skeleton.compiled)
        inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
        self.embedding = self._floats(f"{paths[id(inputs)]}.weight")
        name = f"{paths[id(outputs)]}.weight"
        tied = outputs.weight is inputs.weight and name not in self._stored  # a checkpoint may have a head of its own
        head = self.embedding if tied else self._floats(name)
        if head is not self.embedding and torch.equal(head, self.embedding):
            head = self.embedding
        ours = head.data_ptr() == outputs.weight.data_ptr()
        self.head = skeleton.head() if ours else skeleton.make_head(head)
        self.vocabulary = int(self.embedding.shape[0])
        if isinstance(expert, PackedFiles):
            expert.close()
        del self._lease, self._parameters, self._expert  # what was read is packed by now

    def embed(self, tokens: Tensor) -> Tensor:
        """Embeddings, float32 (..., hidden), of tokens, int64 (...)."""
        return nn.functional.embedding(tokens, self.embedding).to(torch.float32)

    def tensors(self) -> list[Tensor]:
        """What is held in memory for this expert, what it shares with others included."""
        linears = [tensor for linear in (*self._linears, self.head) for tensor in linear.kernels.tensors()]
        biases = [linear.bias for linear in self._linears if linear.bias is not None]
        blocks = self.decoder.blocks
        norms = [norm for block in blocks for norm in (block.attention_norm, block.head_norm, block.mlp_norm)]
        return [self.embedding, self.decoder.norm, *linears, *biases, *(norm for norm in norms if norm is not None)]

    def _block(self, path: str, block: nn.Module) -> Block:
        shape, attention, mlp = self._skeleton.shape, f"{path}.self_attn", f"{path}.mlp"
        device = self._skeleton.device
        orders = [rotated_order(n, shape.head_dim).to(device) for n in (shape.heads, shape.kv_heads)]
        norms = None
        if f"{attention}.q_norm.weight" in self._parameters:
            within = rotated_order(1, shape.head_dim).to(device)
            pair = zip(("q_norm", "k_norm"), (shape.heads, shape.kv_heads), strict=True)
            norms = torch.cat([self._floats(f"{attention}.{n}.weight")[within].expand(count, -1) for n, count in pair])
        return Block(
            self._floats(f"{path}.input_layernorm.weight"),
            self._linear([f"{attention}.{n}_proj" for n in "qkv"], [*orders, None]),
            norms,
            self._linear([f"{attention}.o_proj"]),
            self._floats(f"{path}.post_attention_layernorm.weight"),
            self._linear([f"{mlp}.gate_proj", f"{mlp}.up_proj"]),
            self._linear([f"{mlp}.down_proj"]),
        )

    def _linear(self, paths: Sequence[str], orders: Sequence[Tensor | None] = ()) -> PackedLinear | Together:
        """Linears with the same input as one; `orders` are those of their rows."""
        weights, biases = [], []
        for path, order in zip(paths, orders or [None] * len(paths), strict=True):
            weight, bias = self._weight(f"{path}.weight"), None
            if f"{path}.bias" in self._parameters:
                bias = self._floats(f"{path}.bias")
            if order is not None:
                weight = weight[order] if isinstance(weight, Tensor) else weight.in_order(order, "rotated")
                bias = bias if bias is None else bias[order]
            weights.append(weight)
            biases.append(bias)
        if len(weights) == 1:
            return self._packed(weights[0], biases[0])
        grouped = [weight for weight in weights if isinstance(weight, GroupedWeight)]
        floats = [weight for weight in weights if isinstance(weight, Tensor)]
        whole: GroupedWeight | Tensor | None = None
        if not floats:
            whole = concatenated(grouped)
        elif not grouped:
            whole = torch.cat(floats)
        if whole is None:
            return Together([self._packed(*pair) for pair in zip(weights, biases, strict=True)])
        rows = [weight.shape[0] for weight in weights]
        bias = None
        if any(found is not None for found in biases):
            zeros = (torch.zeros(count, device=self._skeleton.device) for count in rows)
            bias = torch.cat([zero if found is None else found for found, zero in zip(biases, zeros, strict=True)])
        return self._packed(whole, bias)

    def _packed(self, weight: GroupedWeight | Tensor, bias: Tensor | None) -> PackedLinear:
        bits = 16 if isinstance(weight, Tensor) else weight.activation_bits
        kernels = pack_kernels(weight, self._skeleton.precision, self._skeleton.codes)
        self._linears.append(PackedLinear(kernels, bias, self._skeleton.choice, bits))
        return self._linears[-1]

    def _weight(self, name: str) -> GroupedWeight | Tensor:
        """A linear's weight, its rows in the order of the files."""
        expert = self._expert
        if expert is None or name not in self._stored:
            return self._floats(name)
        self._advance(1)
        stored = expert.packed(name, self._lease) if isinstance(expert, PackedFiles) else expert.load(name)
        if isinstance(stored, Tensor):
            return self._checked(name, stored)
        key = self._keys.get(name) if isinstance(stored, PackedTensor) else None
        weight = grouped_weight(stored, key)
        self._check(name, weight.shape, weight.scale)
        if weight.shift is not None:
            self._check(name, weight.shape, weight.shift)
        return weight

    def _floats(self, name: str) -> Tensor:
        """A float parameter: the skeleton's own where the expert has the same values, else in float32."""
        ours: Tensor = self._parameters[name]
        if self._expert is None or name not in self._stored:
            return ours.detach()
        self._advance(1)
        stored = self._expert.load(name)
        value = stored if isinstance(stored, Tensor) else stored.dequantize()
        same = not ours.is_meta and ours.shape == value.shape
        if same and torch.equal(ours.detach(), value.to(ours.device, ours.dtype)):
            return ours.detach()
        return self._checked(name, value)

    def _checked(self, name: str, value: Tensor) -> Tensor:
        self._check(name, tuple(value.shape), value)
        return value.to(self._skeleton.device, torch.float32)

    def _check(self, name: str, shape: tuple[int, ...], values: Tensor) -> None:
        expected = tuple(self._parameters[name].shape)
        if shape != expected:
            raise CheckpointError(
                f"expert {self._name} does not belong to this base model: {name} is {shape} and should be {expected}"
            )
        if not torch.isfinite(values).all():
            raise NumericalError(f"expert {self._name}: {name} is not finite; build it again or remove it")


def _code_keys(expert: ExpertFiles | None) -> dict[str, Key]:
    """For every packed weight of an expert what tells whether another one has the same codes: a file and a name."""
    if not isinstance(expert, CompressedTensorsFiles):
        return {}
    codes = (part for part in expert.parts() if part.kind == "codes" and in_block(part.name))
    return {part.name.removesuffix("_packed"): (*identity(part.path), part.name) for part in codes}
