"""Comparing two models by their logits on fixed rows."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from .model import Checkpoint

MERGED = 1e-4  # largest accepted change of the logits by a merge, relative to the largest logit


@torch.no_grad()
def fixed_logits(checkpoint: Checkpoint) -> Tensor:
    """[4, 32, V] logits of fixed rows with masks in them: equal for two loads of one model. The
    second half of a row is noisy to a draft adapter."""
    model, draft = checkpoint.model, checkpoint.draft
    generator = torch.Generator().manual_seed(0)
    tokens = min(len(checkpoint.tokenizer), model.config.get_text_config().vocab_size)
    ids = torch.randint(tokens, (4, 32), generator=generator)
    masked = torch.rand(ids.shape, generator=generator) < 0.3
    ids = ids.masked_fill(masked, checkpoint.read_as.mask_token_id).to(model.device)
    with nullcontext() if draft is None else draft.applied(model, slice(16, None)):
        return torch.stack([model(row[None]).logits[0].cpu() for row in ids])


def far(before: Tensor, after: Tensor) -> float:
    """The largest difference in the logits, relative to the largest logit."""
    return ((before - after).abs().max() / before.abs().max()).item()
