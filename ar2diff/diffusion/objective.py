"""Weights and divisors of the loss, a weighted cross-entropy over masked tokens.

    loss = sum_i coef_i * -log p(x0_i | xt) / divisor,   coef_i = w(t) * weight_i

With w = 1/t and t = k/n the sum over a row is an unbiased estimate of the bound on -log p(x0)
(MDLM, Sahoo et al. 2024, eq. 10). The divisor is a sum over the *global* batch, across all
accumulation steps and ranks, so that splitting the batch differently does not change the gradient.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..core.attention import PADDING


def coefficients(
    masked: Tensor,
    weight: Tensor,
    seq: Tensor,
    time_weight: Tensor,
    normaliser: str,
) -> tuple[Tensor, Tensor]:
    """The factor of each masked token's cross-entropy, and this batch's share of the divisor.

    Args:
        masked: [B, L] bool.
        weight: [B, L] float, how much a token counts: 1, a fraction if it is in a run of EOS
            tokens, or 0 if it is never scored.
        seq: [B, L] int, the sequence (packed document) within the row, or `PADDING`.
        time_weight: [B, L] float, w(t) from `time_weights` or `cart_weights`.
        normaliser: `tokens` divides by the number of scored tokens, `masked` by that of masked
            ones (`masked+ar` also, see `joint_divisors`); `sequence` divides each sequence by its
            own scored tokens, and the sum by the number of sequences.

    Returns:
        coef: [B, L] float, zero where nothing is masked. divisor: scalar.
    """
    coef = masked * weight * time_weight
    if normaliser == "tokens":
        return coef, weight.sum()
    if normaliser in ("masked", "masked+ar"):
        return coef, (weight * masked).sum()
    same = (seq[:, :, None] == seq[:, None, :]) & (seq != PADDING)[:, None, :]
    tokens = (same * weight[:, None, :]).sum(-1)  # [B, L], scored tokens in the same sequence
    sequences = sum(len(row[row != PADDING].unique()) for row in seq)
    return coef / tokens.clamp(min=torch.finfo(tokens.dtype).tiny), torch.tensor(float(sequences))


def joint_divisors(normaliser: str, divisor: Tensor, ar: Tensor) -> tuple[Tensor, Tensor]:
    """A batch's shares of the divisors of the diffusion loss and of the AR loss.

    With `masked+ar` both are their sum, the number of masked tokens plus that of tokens in the AR
    loss, so that `ar_weight` is the ratio of two tokens' weights. Published joint training
    (Nemotron-Labs-Diffusion) weighs AR 1.0 to diffusion 0.3, which is an `ar_weight` of 3.3, up to
    a common factor.

    Args:
        divisor: scalar from `coefficients`. ar: scalar, the number of tokens in the AR loss.
    """
    return (divisor + ar, divisor + ar) if normaliser == "masked+ar" else (divisor, ar)


def time_weights(t: Tensor, kind: str) -> Tensor:
    """w(t): 1 for `uniform` and `bound`; 1/t for `1/t`, which makes the loss the bound (0 if
    nothing was masked)."""
    if kind in ("uniform", "bound"):
        return torch.ones_like(t)
    return torch.where(t > 0, 1 / t.clamp(min=torch.finfo(t.dtype).tiny), 0)


def cart_weights(masked: Tensor, context: Tensor, seq: Tensor, block: Tensor, p: float) -> Tensor:
    """The context-adaptive weights of Dream (Ye et al. 2025). The weight of a masked token n is
    1/2 * sum over the visible tokens i of p (1 - p)^(|n - i| - 1), so that tokens with visible
    tokens nearby count more.

    Args:
        masked, context: [B, L] bool; `context` marks real tokens (not EOS fill or padding).
        seq, block: [B, L] int. Tokens in earlier blocks are visible, those in later blocks are not,
            and those in the same block are visible unless masked. (`full` attention has one block.)

    Returns:
        [B, L] float.
    """
    index = torch.arange(masked.shape[1])
    distance = (index[:, None] - index[None, :]).abs().clamp(min=1)
    geometric = p * (1 - p) ** (distance - 1).float()
    earlier = block[:, None, :] < block[:, :, None]
    inside = (block[:, None, :] == block[:, :, None]) & ~masked[:, None, :]
    visible = (earlier | inside) & context[:, None, :] & (seq[:, :, None] == seq[:, None, :])
    return 0.5 * (visible * geometric).sum(-1)


def suppressed_ids(mask_token_id: int | None, tokens: Iterable[int], rows: int) -> Tensor:
    """[rows] bool: the mask, and every id that is not in `tokens`, the ids of the tokenizer."""
    suppressed = torch.ones(rows, dtype=torch.bool)
    suppressed[[token for token in tokens if token < rows]] = False
    if mask_token_id is not None:
        suppressed[mask_token_id] = True
    return suppressed
