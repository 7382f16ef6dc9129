"""A bigram head: a low-rank bias on the logits of a token, given the token before it.

Slots that are predicted in one forward ignore each other. Drawn from left to right with this bias,
each knows its left neighbour (DSpark, 2607.05147: U_k + W1[x_{k-1}] W2). Draft adapters and
diffusion heads have the same one.

This file is copied into converted folders: it imports torch alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

SPREAD = 0.02  # of the first factor at the start; the second is zero, so that nothing moves


class BigramHead(torch.nn.Module):
    """The bias W1[previous token] W2.

    Args:
        vocabulary: V, tokens that can come before or after. rank: r.
        generator: of the initial first factor; None leaves both at zero, to be loaded.

    Attributes:
        before: W1, [V, r]. after: W2, [r, V].
    """

    def __init__(self, vocabulary: int, rank: int, generator: torch.Generator | None = None):
        super().__init__()
        before = torch.zeros(vocabulary, rank)
        if generator is not None:
            before.normal_(std=SPREAD, generator=generator)
        self.before = torch.nn.Parameter(before)
        self.after = torch.nn.Parameter(torch.zeros(rank, vocabulary))

    def forward(self, previous: Tensor) -> Tensor:
        """Biases [N, V] of the tokens that follow `previous` [N]."""
        return self.before[previous] @ self.after
