"""What experts are to say about the training windows: what the base says, computed once, or that and the text itself.

Kept are the hidden states before the head, (windows, tokens, hidden), a fiftieth or less of the logits; logits are made
again for a few positions at a time.

With a `text_weight` w the target at every position is (1 - w) base + w text, where the text puts everything on the
token that follows. The gradient is that of (1 - w) KL(base || student) + w times the cross-entropy, so this is
distillation with hard labels beside the soft ones (Hinton et al. 2015, section 2).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from moqe.methods.distill.student import Student
from moqe.models.decoder import Decoder
from moqe.models.device import mixed_precision
from moqe.progress import Progress, Silent

_BATCH = 8
_LOGIT_ELEMENTS = 1 << 24  # logits held at once: 64 MiB of float32


class BaseAnswers:
    """The base's hidden states before the head, float32 (windows, tokens, hidden), made when they are asked for."""

    def __init__(self, run: Callable[[], Tensor]) -> None:
        self._run = run

    @cached_property
    def hidden(self) -> Tensor:
        """Of windows of tokens less the last."""
        return self._run()


@dataclass(frozen=True)
class Targets:
    """What the base says about windows, and how much of what the text says is mixed into it.

    dtype: of the products that made the answers, and of those that will be compared with them. text_weight: see the
    file's header, in [0, 1).
    """

    answers: BaseAnswers
    dtype: torch.dtype
    text_weight: float = 0.0

    @classmethod
    def later(
        cls,
        decoder: Decoder,
        tokens: Tensor,
        dtype: torch.dtype = torch.float32,
        progress: Progress | None = None,
        rows: Tensor | None = None,
    ) -> Targets:
        """The base model's answers on windows, int64 (n, t), for which it is run on first use.

        rows: the only windows that will be looked at, int64; the others' answers are not a number. None: all.
        """
        some = torch.arange(len(tokens)) if rows is None else rows
        return cls(BaseAnswers(partial(_run_base, decoder, tokens, some, dtype, progress or Silent())), dtype)

    @classmethod
    def of(
        cls, decoder: Decoder, tokens: Tensor, dtype: torch.dtype = torch.float32, progress: Progress | None = None
    ) -> Targets:
        """The same for all windows, the base being run at once."""
        found = cls.later(decoder, tokens, dtype, progress)
        found.answers.hidden  # noqa: B018
        return found

    @property
    def hidden(self) -> Tensor:
        """See `BaseAnswers`."""
        return self.answers.hidden

    def divergence(self, student: Student, tokens: Tensor, rows: Tensor) -> Tensor:
        """KL(target || student) of the next token, nats, mean over the positions of each window at `rows`: (b,)."""
        return self._every(student, tokens, rows).mean(1)

    def halves(self, student: Student, tokens: Tensor, rows: Tensor) -> Tensor:
        """The same for the first and the second half of each window's positions: (b, 2)."""
        first, second = self._every(student, tokens, rows).tensor_split(2, dim=1)
        return torch.stack([first.mean(1), second.mean(1)], dim=1)

    def _every(self, student: Student, tokens: Tensor, rows: Tensor) -> Tensor:
        """The divergence at every position: (b, t - 1), on the CPU."""
        with torch.no_grad(), mixed_precision(self.dtype, student.device):
            hidden = student.hidden(tokens[rows][:, :-1])
            parts = [self._kl(student, *piece) for piece in self._pieces(student, hidden, tokens, rows)]
        return torch.cat(parts).view(len(rows), -1).cpu()

    def backward(self, student: Student, tokens: Tensor, rows: Tensor) -> float:
        """Add the gradient of the mean divergence at `rows` to the student's parameters; the divergence, nats."""
        with mixed_precision(self.dtype, student.device):
            hidden = student.hidden(tokens[rows][:, :-1])
        total, gradient = 0.0, []
        for piece in self._pieces(student, hidden.detach(), tokens, rows):
            with mixed_precision(self.dtype, student.device):
                divergence, part = self._kl_and_gradient(student, *piece)
            total += float(divergence.sum())
            gradient.append(part)
        positions = hidden.shape[0] * hidden.shape[1]
        hidden.backward(torch.cat(gradient).view(hidden.shape) / positions)  # type: ignore[no-untyped-call]
        return total / positions

    def _kl(self, student: Student, mine: Tensor, theirs: Tensor, following: Tensor) -> Tensor:
        """(positions,), of the student's and the base's hidden states and the token that follows, int64."""
        wanted = self._wanted(student, theirs, following)
        target = wanted.exp()
        found = student.head(mine).float().log_softmax(-1)
        return wanted.sub_(found).mul_(target).sum(-1)

    def _kl_and_gradient(
        self, student: Student, mine: Tensor, theirs: Tensor, following: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The same, and its gradient by the student's hidden states, float32 (positions, hidden).

        By the logits it is the student's probabilities less those wanted, which is half the passes over a vocabulary
        that autograd takes.
        """
        with torch.no_grad():
            wanted = self._wanted(student, theirs, following)
            target = wanted.exp()
        leaf = mine.requires_grad_(True)
        logits = student.head(leaf)
        with torch.no_grad():
            found = logits.float().log_softmax(-1)
            divergence = wanted.sub_(found).mul_(target).sum(-1)
            difference = found.exp_().sub_(target).to(logits.dtype)
        (gradient,) = torch.autograd.grad(logits, leaf, difference)
        return divergence, gradient

    def _wanted(self, student: Student, theirs: Tensor, following: Tensor) -> Tensor:
        """Logarithms of the target's probabilities, float32 (positions, vocabulary)."""
        wanted = student.head(theirs).float().log_softmax(-1)
        if self.text_weight:
            wanted += math.log1p(-self.text_weight)
            place, weight = following[:, None], wanted.new_tensor(self.text_weight)
            wanted.scatter_(-1, place, torch.logaddexp(wanted.gather(-1, place), weight.log()))
        return wanted

    def _pieces(self, student: Student, hidden: Tensor, tokens: Tensor, rows: Tensor) -> list[tuple[Tensor, ...]]:
        theirs, following = self.hidden[rows].to(hidden.device), tokens[rows][:, 1:].to(hidden.device)
        size = max(1, _LOGIT_ELEMENTS // student.vocabulary)
        parts = (torch.split(part.flatten(0, 1), size) for part in (hidden, theirs, following))
        return list(zip(*parts, strict=True))


def _run_base(decoder: Decoder, tokens: Tensor, some: Tensor, dtype: torch.dtype, progress: Progress) -> Tensor:
    """Hidden states before the head of the windows at the rows `some`, one block in memory at a time."""
    seen, total = tokens[some, :-1], decoder.number_of_blocks
    with progress.track("distill: run the base", total) as advance, torch.no_grad():
        hidden = decoder.embed(seen)
        for index in range(total):
            block = decoder.load_block(index)
            for rows in torch.split(torch.arange(len(hidden)), _BATCH):
                part = hidden[rows]
                with mixed_precision(dtype, decoder.device):
                    hidden[rows] = decoder.run_block(block, part, decoder.block_inputs(part)[index]).float()
            decoder.release_block(index)
            advance(1)
        for rows in torch.split(torch.arange(len(hidden)), _BATCH):
            hidden[rows] = decoder.normalised(hidden[rows])
    if len(some) == len(tokens):
        return hidden
    found = hidden.new_full((len(tokens), *hidden.shape[1:]), float("nan"))
    found[some] = hidden
    return found
