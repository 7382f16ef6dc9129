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

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .cross_entropy import cast_for_autocast, rows_at_once

PART = 1 << 21  # logits processed at a time: a divergence needs several tensors of their size
LEAST = 256  # rows processed at a time on a GPU
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


def later_visible(visible: Tensor, block: Tensor) -> Tensor:
    """Whether a later token of the same block is visible, [B, L] bool. The AR prediction of a
    token, which sees none after it, is a valid target only where this is False.

    Args:
        visible: [B, L] bool, tokens that the model sees, neither masked nor padding.
        block: [B, L] int of at least 0, the block of each token within its row.
    """
    place = torch.arange(block.shape[1], device=block.device).expand_as(block)
    last = torch.full((len(block), int(block.max()) + 1), -1, device=block.device)
    last.scatter_reduce_(1, block, place.masked_fill(~visible, -1), "amax")
    return last.gather(1, block) > place


@dataclass(frozen=True)
class Readout:
    """The logits of N positions, or the inputs of the output head, from which they are made a few
    rows at a time.

    Attributes:
        rows: [N, V] logits, or [N, H] inputs.
        weights: the weight [V, H] of the head and its bias [V], if it has one; () for logits.
    """

    rows: Tensor
    weights: tuple[Tensor, ...] = ()

    @classmethod
    def of_head(cls, head: torch.nn.Linear, inputs: Tensor) -> Readout:
        """A readout through the head of a model that satisfies `has_plain_head`."""
        inputs, weight, bias = cast_for_autocast(inputs, head.weight, head.bias)
        return cls(inputs, (weight,) if bias is None else (weight, bias))

    @property
    def width(self) -> int:
        """V."""
        return len(self.weights[0]) if self.weights else self.rows.shape[1]

    def __getitem__(self, chosen: Any) -> Readout:
        """The readout of some of the positions."""
        return Readout(self.rows[chosen], self.weights)

    def logits(self, rows: slice) -> Tensor:
        """[n, V], without a gradient."""
        with torch.no_grad():
            return logits_of(self.rows[rows], *self.weights)


def logits_of(rows: Tensor, *weights: Tensor) -> Tensor:
    """Logits [n, V] of rows of a `Readout` and its weights."""
    return torch.nn.functional.linear(rows, *weights) if weights else rows


def distillation_loss(
    kind: str, q: Readout, p: Readout, target: Tensor, coef: Tensor, suppressed: Tensor
) -> tuple[Tensor, Tensor]:
    """The weighted sum of divergences, sum_i coef_i D_i, and the divergences themselves, [N]
    detached. Logits exist only a few rows at a time.

    Args:
        kind, target: as for `divergence`.
        q: of the model that learns. p: of the AR model, into which no gradient flows.
        coef: [N] float.
        suppressed: [V] bool, ids that no position can hold: q and p are normalized without them.
    """

    def of_part(rows: slice, part: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
        own = logits_of(*part, *weights).masked_fill(suppressed, float("-inf"))
        other = p.logits(rows).masked_fill(suppressed, float("-inf"))
        return divergence(kind, own, other, target[rows])

    size = rows_at_once(q.width, q.rows.device.type, PART, LEAST)
    return sum_in_parts(of_part, coef, size, (q.rows,), q.weights)


def sum_in_parts(
    of_part: Callable[[slice, Sequence[Tensor], Sequence[Tensor]], Tensor],
    coef: Tensor,
    size: int,
    by_row: Sequence[Tensor],
    shared: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """sum_i coef_i term_i, where the terms are computed a few rows at a time and their gradients in
    the same pass: whatever a part needs in between is freed before the next one.

    Args:
        of_part: the terms [n] of some rows, given (their slice, `by_row` of these rows, `shared`);
            differentiable with respect to both.
        coef: [N] float, constants. size: rows in a part.
        by_row: tensors with N rows. shared: tensors that all rows need.

    Returns:
        The sum, with the gradient; the terms [N], detached.
    """
    return _InParts.apply(of_part, coef, size, len(by_row), *by_row, *shared)


class _InParts(torch.autograd.Function):
    """Computes the gradients in the forward pass; the result is a sum, so the backward pass only
    has to scale them."""

    @staticmethod
    def forward(
        ctx: Any, of_part: Any, coef: Tensor, size: int, count: int, *inputs: Tensor
    ) -> tuple[Tensor, Tensor]:
        needed = ctx.needs_input_grad[4:]
        dtype = torch.promote_types(inputs[0].dtype, torch.float32)
        coef, terms = coef.to(dtype), torch.empty(len(coef), dtype=dtype, device=coef.device)
        sums = [
            torch.zeros_like(x, dtype=dtype) if wanted else None
            for x, wanted in zip(inputs, needed, strict=True)
        ]
        for start in range(0, len(coef), size):
            rows = slice(start, start + size)
            with torch.enable_grad(), torch.autocast(coef.device.type, enabled=False):
                part = [
                    (x[rows] if n < count else x).detach().requires_grad_(wanted)
                    for n, (x, wanted) in enumerate(zip(inputs, needed, strict=True))
                ]
                values = of_part(rows, part[:count], part[count:]).to(dtype)
                terms[rows] = values.detach()
                wanted = [n for n, use in enumerate(needed) if use]
                if not wanted:
                    continue
                found = torch.autograd.grad((coef[rows] * values).sum(), [part[n] for n in wanted])
            for n, gradient in zip(wanted, found, strict=True):
                (sums[n][rows] if n < count else sums[n]).add_(gradient)
        ctx.save_for_backward(*sums)
        ctx.dtypes = [x.dtype for x in inputs]
        ctx.mark_non_differentiable(terms)
        return (coef * terms).sum(), terms

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, given: Tensor, _: Any) -> tuple[Any, ...]:
        made = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return *[None] * 4, *(None if x is None else x.mul_(given).to(dtype) for x, dtype in made)
