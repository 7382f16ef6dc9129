"""Comparing two models by their logits on fixed rows."""

from __future__ import annotations

import torch
from torch import Tensor

from .model import Checkpoint

MERGED = 1e-4  # a merge that changes logits by more, relative to the largest, is refused


@torch.no_grad()
def fixed_logits(checkpoint: Checkpoint) -> Tensor:
    """[4, 32, V] logits of fixed rows, masks among them; two loads of a model have the same."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(len(checkpoint.tokenizer), (4, 32), generator=generator)
    masked = torch.rand(ids.shape, generator=generator) < 0.3
    ids = ids.masked_fill(masked, checkpoint.spec.mask_token_id)
    model = checkpoint.model
    return torch.stack([model(row[None].to(model.device)).logits[0].cpu() for row in ids])


def far(before: Tensor, after: Tensor) -> float:
    """The largest difference of logits over the largest logit."""
    return ((before - after).abs().max() / before.abs().max()).item()
