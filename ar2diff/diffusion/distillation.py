"""Distillation: how far a model's prediction q of a token is from that of an AR model, p, and the
loss that makes it smaller.

    ce  -log q(target)
    kl  KL(p || q) = sum_v p(v) log(p(v) / q(v))
    tv  sum_v |q(v) - p(v)|, twice the total variation. In speculative sampling a draft from q is
        accepted with probability sum_v min(p(v), q(v)) = 1 - tv / 2 (Leviathan et al. 2023).
    lk  lambda kl + (1 - lambda) tv with lambda = exp(-3 a), where a = 1 - tv / 2 is detached: kl
        where p and q are far apart, tv where they are close (LK losses, 2602.23881)

DSpark (2607.05147) trains drafts with 0.1 ce + 0.9 tv.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

SHARPNESS = 3.0  # of lambda in lk


def divergence(kind: str, q_logits: Tensor, p_logits: Tensor, target: Tensor) -> Tensor:
    """How far q is from p at each position, [N] in nats (`tv`: between 0 and 2), in float32 or
    better.

    Args:
        kind: `ce`, `kl`, `tv` or `lk`.
        q_logits: [N, V], of the model that learns. p_logits: [N, V], of the AR model; no gradient
            flows into them. Ids that no position can hold have the logit -inf in both, so that both
            distributions are normalized without them.
        target: [N] int, the tokens themselves, which only `ce` reads.
    """
    return mixed_divergence({kind: 1.0}, q_logits, p_logits, target)


def mixed_divergence(
    weights: Mapping[str, float], q_logits: Tensor, p_logits: Tensor, target: Tensor
) -> Tensor:
    """The weighted sum of several divergences, for example {"ce": 0.1, "tv": 0.9}, [N]; the other
    arguments are those of `divergence`."""
    log_q, p = log_probabilities(q_logits), log_probabilities(p_logits.detach()).exp()
    return weighted_divergence(weights, log_q, p, target)


def weighted_divergence(
    weights: Mapping[str, float], log_q: Tensor, p: Tensor, target: Tensor
) -> Tensor:
    """`mixed_divergence`, given the log-probabilities of q and the probabilities p, [N, V]."""
    total = torch.zeros_like(log_q[:, 0])
    for kind, weight in weights.items():
        total = total + weight * _KINDS[kind](log_q, p, target)
    return total


def acceptance(q_logits: Tensor, p_logits: Tensor) -> Tensor:
    """The probability that speculative sampling accepts a draft from q, [N]: the overlap
    sum_v min(p(v), q(v)). Arguments as for `divergence`."""
    q, p = (log_probabilities(logits).exp() for logits in (q_logits, p_logits))
    return torch.minimum(q, p).sum(-1)


def log_probabilities(logits: Tensor) -> Tensor:
    """log softmax over the last dimension, in float32 or better."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def _ce(log_q: Tensor, p: Tensor, target: Tensor) -> Tensor:
    return -log_q.gather(1, target[:, None])[:, 0]


def _kl(log_q: Tensor, p: Tensor, target: Tensor) -> Tensor:
    # Where p is 0, q may be 0 too, and 0 * -inf would be NaN.
    return (torch.xlogy(p, p) - p * log_q.masked_fill(p == 0, 0)).sum(-1)


def _tv(log_q: Tensor, p: Tensor, target: Tensor) -> Tensor:
    return (log_q.exp() - p).abs().sum(-1)


def _lk(log_q: Tensor, p: Tensor, target: Tensor) -> Tensor:
    kl, tv = _kl(log_q, p, target), _tv(log_q, p, target)
    share = torch.exp(-SHARPNESS * (1 - tv.detach() / 2))
    return share * kl + (1 - share) * tv


_KINDS = {"ce": _ce, "kl": _kl, "tv": _tv, "lk": _lk}
