"""What the base model says about the training windows: computed once, followed by every expert.

Kept are the hidden states before the head, (windows, tokens, hidden), a fiftieth or less of the logits; logits are made
again for a few positions at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moqe.methods.distill.student import Student
from moqe.models.decoder import Decoder
from moqe.models.device import mixed_precision
from moqe.progress import Progress, Silent

_BATCH = 8
_LOGIT_ELEMENTS = 1 << 24  # logits held at once: 64 MiB of float32


@dataclass(frozen=True)
class Targets:
    """The base's hidden states before the head, float32 (windows, tokens, hidden), for windows of tokens less the last.

    dtype: of the products that made them, and of those that will be compared with them.
    """

    hidden: Tensor
    dtype: torch.dtype

    @classmethod
    def of(
        cls, decoder: Decoder, tokens: Tensor, dtype: torch.dtype = torch.float32, progress: Progress | None = None
    ) -> Targets:
        """Run the base model over windows, int64 (n, t), one block in memory at a time."""
        seen, shown = tokens[:, :-1], progress or Silent()
        total = decoder.number_of_blocks
        with shown.track("distill: run the base", total) as advance, torch.no_grad():
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
        return cls(hidden, dtype)

    def divergence(self, student: Student, tokens: Tensor, rows: Tensor) -> Tensor:
        """KL(base || student) of the next token, nats, mean over the positions of each window at `rows`: (b,)."""
        return self._every(student, tokens, rows).mean(1)

    def halves(self, student: Student, tokens: Tensor, rows: Tensor) -> Tensor:
        """The same for the first and the second half of each window's positions: (b, 2)."""
        first, second = self._every(student, tokens, rows).tensor_split(2, dim=1)
        return torch.stack([first.mean(1), second.mean(1)], dim=1)

    def _every(self, student: Student, tokens: Tensor, rows: Tensor) -> Tensor:
        """The divergence at every position: (b, t - 1), on the CPU."""
        with torch.no_grad(), mixed_precision(self.dtype, student.device):
            hidden = student.hidden(tokens[rows][:, :-1])
            parts = [self._kl(student, mine, theirs) for mine, theirs in self._pieces(student, hidden, rows)]
        return torch.cat(parts).view(len(rows), -1).cpu()

    def backward(self, student: Student, tokens: Tensor, rows: Tensor) -> float:
        """Add the gradient of the mean divergence at `rows` to the student's parameters; the divergence, nats."""
        with mixed_precision(self.dtype, student.device):
            hidden = student.hidden(tokens[rows][:, :-1])
        leaf = hidden.detach().requires_grad_(True)  # logits are made, and dropped, piece by piece
        positions = leaf.shape[0] * leaf.shape[1]
        total = 0.0
        for mine, theirs in self._pieces(student, leaf, rows):
            with mixed_precision(self.dtype, student.device):
                loss = self._kl(student, mine, theirs).sum() / positions
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        hidden.backward(leaf.grad)  # type: ignore[no-untyped-call]
        return total

    def _kl(self, student: Student, mine: Tensor, theirs: Tensor) -> Tensor:
        """(positions,)."""
        with torch.no_grad():
            wanted = student.head(theirs).float().log_softmax(-1)
        found = student.head(mine).float().log_softmax(-1)
        return (wanted.exp() * (wanted - found)).sum(-1)

    def _pieces(self, student: Student, hidden: Tensor, rows: Tensor) -> list[tuple[Tensor, Tensor]]:
        theirs = self.hidden[rows].to(hidden.device)
        size = max(1, _LOGIT_ELEMENTS // student.vocabulary)
        return list(zip(torch.split(hidden.flatten(0, 1), size), torch.split(theirs.flatten(0, 1), size), strict=True))
