"""What a network does with its tensors, found by running it: which function makes one, which ones read it, and where.

Nothing is traced or rewritten. Forward hooks say which module is at work; a TorchFunctionMode sees every function on
tensors that is called meanwhile. A tensor is known by its object and by how often it was written to, so that the
output of a ReLU that works in place is not taken for its input. Inside functions that torch composes of others, and
inside scripted ones, nothing is seen: a tensor that only they read has no reader here.

Cost: one run, during which every intermediate tensor is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from moqe.errors import ModelError

Key = tuple[int, int]  # id of the tensor object, number of writes to it

_NO_RESULT = frozenset({"__setitem__"})  # these change tensors and return none


@dataclass(frozen=True)
class Operation:
    """One function call on tensors. module: the innermost module at work, "" for the network itself.

    weights: names of the network's parameters among the arguments; parameters are not in `reads`. nonnegative: whether
    no value of what it made is below zero.
    """

    function: str
    module: str
    reads: tuple[Key, ...]
    makes: tuple[Key, ...]
    weights: tuple[str, ...]
    nonnegative: bool


@dataclass(frozen=True, eq=False)
class Call:
    """One forward of a module. source: its input, None unless that is one tensor and nothing else; result likewise."""

    name: str
    module: nn.Module
    source: Key | None
    result: Key | None
    input_shape: tuple[int, ...]
    input_nonnegative: bool


@dataclass
class Run:
    """Everything that happened in one run, in order; calls in the order in which they began."""

    operations: list[Operation] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    kept: list[Tensor] = field(default_factory=list)  # an id names an object only as long as that lives

    def readers(self, key: Key) -> Iterator[Operation]:
        """The operations that read a tensor."""
        return (operation for operation in self.operations if key in operation.reads)

    def calls_of(self, name: str) -> list[Call]:
        """The forwards of a module."""
        return [call for call in self.calls if call.name == name]


def observe(network: nn.Module, example: Tensor) -> Run:
    """Run a network on images, (b, 3, h, w), without gradients, and say what happened.

    Raises ModelError when it cannot run on such images.
    """
    watch = _Watch(network)
    handles = [
        handle
        for name, module in network.named_modules()
        for handle in (
            module.register_forward_pre_hook(watch.begin(name), with_kwargs=True),
            module.register_forward_hook(watch.end(name), with_kwargs=True),
        )
    ]
    try:
        with torch.no_grad(), watch:
            network(example)
    except Exception as error:  # the network's code may raise anything
        raise cannot_run(network, example, error) from error
    finally:
        for handle in handles:
            handle.remove()
    return watch.finished()


def cannot_run(network: nn.Module, example: Tensor, error: Exception) -> ModelError:
    """The error for a network that fails on an example."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return ModelError(
        f"{type(network).__name__} cannot run on images of shape {tuple(example.shape)} ({reason}): an image "
        "classifier takes float32 (images, 3, height, width); check the preprocessing's size"
    )


class _Watch(TorchFunctionMode):
    """Collects a run. The mode is off while a function that it has seen computes, so each call is seen once."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self._run = Run()
        self._working: list[tuple[str, int]] = []  # name, position among the calls
        self._blind = False
        self._parameters = {id(parameter): name for name, parameter in network.named_parameters()}

    def begin(self, name: str) -> Callable[..., None]:
        """A forward pre-hook: the module `name` is at work from here."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tensor = _only_tensor(args, kwargs)
            self._working.append((name, len(self._run.calls)))
            self._run.calls.append(Call(name, module, None, None, (), False))
            if tensor is not None:
                with self._unseen():
                    self._run.calls[-1] = Call(
                        name, module, self._key(tensor), None, tuple(tensor.shape), _nonnegative(tensor)
                    )

        return hook

    def end(self, name: str) -> Callable[..., None]:
        """A forward hook: the module `name` is done."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            begun, position = self._working.pop()
            assert begun == name
            if isinstance(output, Tensor):
                with self._unseen():
                    self._run.calls[position] = replace(self._run.calls[position], result=self._key(output))

        return hook

    def finished(self) -> Run:
        """The run."""
        return self._run

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._blind:
            return func(*args, **kwargs)
        read = list(_tensors((args, kwargs)))
        reads = tuple(self._key(tensor) for tensor in read if id(tensor) not in self._parameters)
        result = func(*args, **kwargs)
        made = list(_tensors(result))
        name = getattr(func, "__name__", "")
        if made or name in _NO_RESULT:
            self._run.operations.append(
                Operation(
                    name,
                    self._working[-1][0] if self._working else "",
                    reads,
                    tuple(self._key(tensor) for tensor in made),
                    tuple(self._parameters[id(tensor)] for tensor in read if id(tensor) in self._parameters),
                    bool(made) and all(_nonnegative(tensor) for tensor in made),
                )
            )
        return result

    @contextmanager
    def _unseen(self) -> Iterator[None]:
        """What hooks do to look at tensors is no part of the run."""
        self._blind = True
        try:
            yield
        finally:
            self._blind = False

    def _key(self, tensor: Tensor) -> Key:
        self._run.kept.append(tensor)
        return id(tensor), tensor._version


def _only_tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The module's input, if it is one tensor given by position and there is no other argument."""
    return args[0] if len(args) == 1 and not kwargs and isinstance(args[0], Tensor) else None


def _tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor inside nested tuples, lists and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)


def _nonnegative(tensor: Tensor) -> bool:
    return tensor.numel() > 0 and tensor.dtype.is_floating_point and bool((tensor >= 0).all())
