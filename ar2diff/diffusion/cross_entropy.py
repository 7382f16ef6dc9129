"""Cross-entropy, from logits or straight through the output embeddings.

In a small model, logits take most of the memory, and moving them takes most of the time. So they
are processed a few rows at a time, which stay in the CPU's caches. In training, where the loss is a
sum of weighted cross-entropies, the gradient of those rows is computed in the same pass, so that a
tensor of all logits never exists ("fused linear cross-entropy", Hsu et al. 2024).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

from ..core.forward import quiet_routers
from ..core.noise import Evidence, OwnEvidence

PART = 1 << 23  # logits processed at a time, which the caches of a CPU hold
LEAST = 1024  # rows processed at a time on a GPU: fewer would leave most of it idle


def cross_entropy(logits: Tensor, target: Tensor, suppressed: Tensor | None = None) -> Tensor:
    """-log p(target), [N], in float32 or better.

    Besides the logits themselves, nothing of their size is kept for the backward pass, which
    creates nothing of that size but their gradient.

    Args:
        logits: [N, V]. target: [N] int.
        suppressed: [V] bool, ids that no position can hold (the mask, rows without a token): their
            logit is -inf, as in the sampler.
    """
    return _OfLogits.apply(logits, target, suppressed, len(logits), None)[0]


@dataclass(frozen=True)
class WeightedLoss:
    """A weighted sum of cross-entropies, with its terms.

    Attributes:
        total: scalar, sum_i coef_i * -log p(target_i).
        ce: [N] -log p(target), detached.
        right: [N] bool, whether the target is the likeliest token.
        terms: the terms of the first positions, if they are not the cross-entropies alone;
            detached.
        divergence: what distillation added for some of them, detached.
    """

    total: Tensor
    ce: Tensor
    right: Tensor
    terms: Tensor | None = None
    divergence: Tensor | None = None


def loss_of_logits(
    logits: Tensor, target: Tensor, coef: Tensor, suppressed: Tensor | None, first: int,
    evidence: Evidence | OwnEvidence | None = None,
) -> WeightedLoss:  # fmt: skip
    """The weighted loss, given logits.

    Args:
        logits: [N, V]. target: [N] int. coef: [N] float.
        suppressed: as for `cross_entropy`. first: `suppressed` applies to this many leading
            positions, and so does `evidence`, which is added to their logits.
    """
    ce, right = _OfLogits.apply(logits, target, suppressed, first, evidence)
    return WeightedLoss((coef * ce).sum(), ce.detach(), right)


def loss_of_hidden(
    head: torch.nn.Linear, hidden: Tensor, target: Tensor, coef: Tensor,
    suppressed: Tensor | None, first: int, added: tuple[Tensor, Tensor] | None = None,
    evidence: Evidence | OwnEvidence | None = None,
) -> WeightedLoss:  # fmt: skip
    """The weighted loss, given the inputs of the output head, [N, H], without making the logits.
    For models that satisfy `has_plain_head`.

    Args:
        added: [N, r] and [r, V], whose product is added to the logits.
        evidence: as for `loss_of_logits`.
    """
    weight = head.weight
    if added is not None:  # one linear layer with a longer input
        hidden = torch.cat([hidden, added[0].to(hidden.dtype)], 1)
        weight = torch.cat([weight, added[1].T.to(weight.dtype)], 1)
    hidden, weight, bias = cast_for_autocast(hidden, weight, head.bias)
    return WeightedLoss(
        *_OfHidden.apply(hidden, weight, bias, coef, target, suppressed, first, evidence)
    )


def cast_for_autocast(*tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors in the type that a matrix product has here: another one under autocast."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [None if x is None else x.to(dtype) for x in tensors]


def has_plain_head(model: Any) -> bool:
    """Whether the logits are simply one linear layer applied to the last hidden states, with no
    adapter, soft cap or scale. Finds out by a forward pass on one token, in which all processes
    take part if the weights are sharded."""
    head = model.get_output_embeddings()
    if type(head) is not torch.nn.Linear or type(head.weight) not in (torch.nn.Parameter, DTensor):
        return False
    rows = getattr(head.weight, "ds_shape", head.weight.shape)[0]  # ZeRO-3 holds a shard of them
    ramp = torch.linspace(-50, 50, rows, device=head.weight.device).view(1, 1, rows)
    made: list[Tensor] = []

    def replaced(_module: Any, _args: Any, output: Tensor) -> Tensor:
        made.append(ramp.to(output.dtype))
        return made[0]

    hook = head.register_forward_hook(replaced)
    try:
        with torch.no_grad():
            token = torch.zeros(1, 1, dtype=torch.long, device=head.weight.device)
            logits = model(input_ids=token, use_cache=False, **quiet_routers(model)).logits
    finally:
        hook.remove()
    # Under autocast the head's output may be rounded, and what the model returns widened again.
    return torch.equal(logits.float(), made[0].to(logits.dtype).float())


class _OfLogits(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, suppressed: Tensor | None, first: int,
        evidence: Evidence | OwnEvidence | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        dtype = torch.promote_types(logits.dtype, torch.float32)
        ce, total = logits.new_empty(2, len(logits), dtype=dtype)
        right = torch.empty_like(target, dtype=torch.bool)
        for rows, ids in _parts(logits.shape, logits.device, suppressed, first):
            part = _gain_(logits[rows].to(dtype, copy=True), rows, evidence)
            ce[rows], total[rows], right[rows] = _exponentiate_(part, target[rows], ids)[:3]
        ctx.save_for_backward(logits, target, suppressed, total)
        ctx.first, ctx.evidence = first, evidence
        ctx.mark_non_differentiable(right)
        return ce, right

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, given: Tensor, _: Any) -> tuple[Any, ...]:
        logits, target, suppressed, total = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        for rows, ids in _parts(logits.shape, logits.device, suppressed, ctx.first):
            factor = given[rows, None]
            part = _gain_(logits[rows] - total[rows, None], rows, ctx.evidence)
            part = part.exp_().mul_(factor)  # p(id)
            if ids is not None:
                part.masked_fill_(ids, 0)
            gradient[rows] = part.scatter_add_(1, target[rows, None], -factor)
        return gradient, *[None] * 4


class _OfHidden(torch.autograd.Function):
    """Computes the gradients in the forward pass; the loss is a sum, so the backward pass only has
    to scale them."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, coef: Tensor,
        target: Tensor, suppressed: Tensor | None, first: int,
        evidence: Evidence | OwnEvidence | None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        shape = (len(hidden), len(weight))
        ce, right = hidden.new_empty(len(hidden), dtype=dtype), torch.empty_like(target).bool()
        coef = coef.to(dtype)
        of_hidden, of_weight, of_bias = (
            torch.zeros_like(x, dtype=dtype) if needed else None
            for x, needed in zip((hidden, weight, bias), ctx.needs_input_grad[:3], strict=True)
        )
        size = rows_at_once(len(weight), hidden.device.type, PART)
        logits = hidden.new_empty(min(len(hidden), size), len(weight))
        with torch.autocast(hidden.device.type, enabled=False):
            for rows, ids in _parts(shape, hidden.device, suppressed, first):
                x = hidden[rows]
                part = torch.mm(x, weight.T, out=logits[: len(x)])
                part = (part if bias is None else part.add_(bias)).to(dtype)
                part = _gain_(part, rows, evidence)
                ce[rows], _, right[rows], total = _exponentiate_(part, target[rows], ids)
                factor = coef[rows, None]
                part.mul_(factor / total).scatter_add_(1, target[rows, None], -factor)
                if of_bias is not None:
                    of_bias += part.sum(0)
                part = part.to(hidden.dtype)
                if of_hidden is not None:
                    of_hidden[rows] = part @ weight
                if of_weight is not None and dtype == hidden.dtype:
                    of_weight.addmm_(part.T, x)
                elif of_weight is not None:
                    of_weight += part.T @ x
        ctx.save_for_backward(of_hidden, of_weight, of_bias)
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        ctx.mark_non_differentiable(ce, right)
        return (coef * ce).sum(), ce, right

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, given: Tensor, *_: Any) -> tuple[Any, ...]:
        made = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return *(None if x is None else x.mul_(given).to(dtype) for x, dtype in made), *[None] * 5


def _gain_(part: Tensor, rows: slice, evidence: Evidence | OwnEvidence | None) -> Tensor:
    """Adds its evidence to the logits of some rows, in place."""
    if evidence is None or rows.start >= len(evidence):
        return part
    return evidence.add_(part, rows)


def _exponentiate_(
    part: Tensor, target: Tensor, ids: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Replaces logits by their exponentials, relative to each row's maximum, in place.

    Returns -log p(target), the log of the normalizer, whether the target is the likeliest token
    (all [n]), and the [n, 1] sums of the exponentials.
    """
    if ids is not None:
        part.masked_fill_(ids, float("-inf"))
    own, largest = part.gather(1, target[:, None]), part.amax(1, keepdim=True)
    total = part.sub_(largest).exp_().sum(1, keepdim=True)
    whole = largest + total.log()
    return (whole - own)[:, 0], whole[:, 0], (own == largest)[:, 0], total


def rows_at_once(width: int, device: str, part: int, least: int = LEAST) -> int:
    """How many rows of logits are processed at a time.

    Args:
        width: V. device: its type. part: logits at a time. least: rows at a time on a GPU.
    """
    return max(least if device == "cuda" else 1, part // width)


def _parts(
    shape: tuple[int, ...], device: torch.device, suppressed: Tensor | None, first: int
) -> Iterator[tuple[slice, Tensor | None]]:
    """Slices of a few rows each, with the ids that are suppressed in them."""
    size = rows_at_once(shape[1], device.type, PART)
    for begin, end, ids in ((0, first, suppressed), (first, shape[0], None)):
        for start in range(begin, end, size):
            yield slice(start, min(start + size, end)), ids
