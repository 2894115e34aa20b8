"""Whether a model's logits are what its output embeddings make of its hidden states, and nothing more."""

from __future__ import annotations

from typing import Any

import torch

from moqe.errors import ModelError


def refuse_changed_logits(model: Any) -> None:
    """Raise ModelError for an architecture that scales or caps its logits after the head.

    Body and head are run apart here, so that logits can be made for a few positions at a time; leaving out what comes
    after the head would be silently wrong. model: a causal language model of transformers.
    """
    head = model.get_output_embeddings()
    vocabulary = int(head.weight.shape[0])
    # Ids from the whole vocabulary: a padding id alone has a zero embedding and would show nothing.
    probe = torch.arange(vocabulary, device=head.weight.device)[:: max(1, vocabulary // 8)][None]
    with torch.no_grad():
        direct = model(input_ids=probe, use_cache=False).logits
        split = head(model.base_model(input_ids=probe, use_cache=False).last_hidden_state)
    if torch.isfinite(direct).all() and not torch.allclose(direct, split, rtol=1e-4, atol=1e-4):
        raise ModelError(f"{type(model).__name__} changes its logits after the head: it is not supported")
