"""Which masked tokens to commit at a step. Confidence is that of the untempered distribution.

This file is copied into converted folders: it imports torch and the standard library alone.
"""

from __future__ import annotations

import torch
from torch import Tensor


def choose_tokens(
    logits: Tensor, temperature: float, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """A token for each position and how sure the model is of it.

    Args:
        logits: [N, V], impossible ids at -inf.
        temperature: 0 takes the likeliest; else a draw from softmax(logits / temperature).

    Returns:
        tokens: [N]. confidence: [N], softmax(logits) of the token.
    """
    probability = logits.float().softmax(-1)
    if temperature == 0:
        confidence, tokens = probability.max(-1)
        return tokens, confidence
    tempered = (logits.float() / temperature).softmax(-1)
    tokens = torch.multinomial(tempered.cpu(), 1, generator=generator)[:, 0].to(logits.device)
    return tokens, probability.gather(-1, tokens[:, None])[:, 0]


def over_threshold(confidence: Tensor, threshold: float) -> Tensor:
    """[N] bool: commit every token above the threshold, and the surest where there is none
    (Fast-dLLM, Wu et al. 2025), so that each step makes progress."""
    commit = confidence > threshold
    commit[confidence.argmax()] = True
    return commit
