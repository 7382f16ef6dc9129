"""One forward of a model at the slots that are wanted, and how long a row it takes.

This file is copied into converted folders: it imports torch and the standard library alone.
"""

from __future__ import annotations

from threading import get_ident
from typing import Any

from torch import Tensor


def context_length(config: Any) -> int | None:
    """Longest row a model takes, in tokens; None where its config does not say."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def logits_at(
    model: Any, index: Tensor, head: Any = None, cache: Any = None, **inputs: Any
) -> Tensor:
    """Logits [N, V] at the wanted slots alone; the [B * S, V] tensor is never built.

    The rows are picked by a pre-hook on the output embeddings, so that soft caps and scales stay
    the model's own. It leaves the forwards of other threads alone.

    Args:
        model: a causal LM, wrapped (DDP) or not.
        index: [N] int, slots of the flattened [B * S].
        head: output embeddings, where `model` is a wrapper that hides them.
        cache: a cache of transformers that holds the keys before the slots and gets theirs.
        inputs: input_ids [B, S], attention_mask, position_ids.
    """

    own = get_ident()

    def pick(_module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if get_ident() != own:
            return None
        return (args[0].flatten(0, 1)[index].unsqueeze(0),)

    handle = (head or model.get_output_embeddings()).register_forward_pre_hook(pick)
    try:
        if cache is None:
            return model(**inputs, use_cache=False).logits[0]
        return model(**inputs, past_key_values=cache, use_cache=True).logits[0]
    finally:
        handle.remove()
