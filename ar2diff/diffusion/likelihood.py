"""Likelihood: the exact-k bound on -log p(x0) with its Monte Carlo error, and the AR mode's NLL.

For a block of n tokens

    -log p(x) <= E_{k ~ U{1..n}} E_{|S|=k} (n/k) sum_{i in S} -log p(x_i | x_notS),

which averages the chain rule over all orders (LLaDA, Nie et al. 2025, eq. 6). The bound for a row
is the sum over its blocks, each given the clean blocks before it. The draws of a block are
stratified in k.

With a diffusion head, p(x_i | x_notS) is softmax(U_i + W1[x_{i-1}] W2) where x_{i-1} is visible,
and softmax(U_i) where it is masked: what the sampler draws a token from that it decides alone. The
bound is thus that of drawing one token at a step, in random order. It reads no masked token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.attention import PADDING, Slots
from ..core.forward import logits_at
from ..core.head import head_of
from ..core.seeds import content_key, keyed_generator
from ..core.spec import Spec
from .cross_entropy import cross_entropy, loss_of_logits
from .noise import corrupt, draw_times
from .objective import time_weights
from .task import Task, masked_task, places_of, slots_at


@dataclass(frozen=True)
class Estimate:
    """Likelihoods of rows, all [R]: `nats`, their Monte Carlo `variance`, and the number of scored
    `tokens`; `greedy` of the AR mode, whether each of them is the likeliest there."""

    nats: Tensor
    variance: Tensor
    tokens: Tensor
    greedy: Tensor | None = None

    def row(self, number: int) -> Estimate:
        """The estimate of one row."""
        one = slice(number, number + 1)
        greedy = None if self.greedy is None else self.greedy[one]
        return Estimate(self.nats[one], self.variance[one], self.tokens[one], greedy)

    @property
    def mean(self) -> float:
        """Nats per token."""
        return (self.nats.sum() / self.tokens.sum()).item()

    @property
    def error(self) -> float:
        """Standard error of `mean` due to the Monte Carlo draws (not to the choice of rows)."""
        return (self.variance.sum().sqrt() / self.tokens.sum()).item()


def total_of(rows: Sequence[Estimate]) -> Estimate:
    """The estimate of a text that was scored in several rows, each of them an estimate."""
    nats, variance, tokens = (
        sum(getattr(row, name).sum() for row in rows).view(1)
        for name in ("nats", "variance", "tokens")
    )
    return Estimate(nats, variance, tokens)


def difference_of(
    one: Estimate, other: Estimate, size: float = 1, other_size: float = 1
) -> tuple[float, float]:
    """The nats of one row divided by a size, minus those of another, and the standard error.

    Args:
        one, other: estimates of a single row.
    """
    apart = one.nats.item() / size - other.nats.item() / other_size
    variance = one.variance.item() / size**2 + other.variance.item() / other_size**2
    return apart, variance**0.5


@torch.no_grad()
def bound(
    model: Any,
    spec: Spec,
    rows: Sequence[Sequence[int]],
    suppressed: Tensor,
    samples: int = 8,
    seed: int = 0,
    batch_size: int = 32,
    starts: Sequence[int] | None = None,
) -> Estimate:
    """Upper bound on each row's -log p, given its first token.

    Args:
        model: in eval mode.
        rows: token ids, each row one document from its first token.
        suppressed: [V] bool, from `objective.suppressed_ids`.
        samples: noise draws per row. The draws depend only on the seed and the row's ids.
        batch_size: rows per forward pass; each row to score takes `samples` of them.
        starts: as for `ar_nll`.
    """
    nats, variance, tokens = [], [], []
    starts = starts or [1] * len(rows)
    per_forward = max(1, batch_size // samples)
    for first in range(0, len(rows), per_forward):
        part, begun = (x[first : first + per_forward] for x in (rows, starts))
        values = _draws(model, spec, part, suppressed, samples, seed, begun)  # [R, samples, K]
        nats.append(values.mean(1).sum(-1))
        variance.append(_stratified_variance(values).sum(-1))
        judged = [scored(*row) for row in zip(part, [suppressed] * len(part), begun, strict=True)]
        tokens.append(torch.tensor([float(row.sum()) for row in judged]))
    return Estimate(torch.cat(nats), torch.cat(variance), torch.cat(tokens))


def scored(row: Sequence[int], suppressed: Tensor, start: int = 1) -> Tensor:
    """[L] bool, which tokens are scored: those from `start`, but for suppressed ids such as the
    mask."""
    return (torch.arange(len(row)) >= start) & ~suppressed[torch.tensor(row)]


def _draws(
    model: Any,
    spec: Spec,
    rows: Sequence[Sequence[int]],
    suppressed: Tensor,
    samples: int,
    seed: int,
    starts: Sequence[int],
) -> Tensor:
    """[R, samples, K] double: (n/k) times the sum of -log p over the masked tokens, for each draw
    and block, with the draws sorted by k."""
    length = max(map(len, rows))
    size = spec.block_length or length
    shape = (len(rows), samples, length)
    x0, doc = torch.zeros(shape, dtype=torch.long), torch.full(shape, PADDING)
    masked, t = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.double)
    for r, row in enumerate(rows):
        ids, n = torch.tensor(row), len(row)
        # Draws depend on the row alone, or on what its continuation is given: choices share them.
        given = row[: starts[r]] if starts[r] > 1 else row
        generator = keyed_generator(seed, content_key(given))
        block = torch.arange(n) // size
        maskable = scored(row, suppressed, starts[r])
        times = draw_times(samples, int(block[-1]) + 1, generator).sort(0).values
        x0[r, :, :n], doc[r, :, :n] = ids, 0
        for s, draw in enumerate(times):
            masked[r, s, :n], t[r, s, :n] = corrupt(maskable, block, draw, generator)
    x0, doc, masked, t = (x.flatten(0, 1) for x in (x0, doc, masked, t))
    pos = torch.arange(length).expand_as(x0)
    ce = masked_nll(model, spec, x0, masked, doc, pos, suppressed)
    values = torch.zeros(*x0.shape, dtype=torch.double)
    values[masked] = ce.double() * time_weights(t, "1/t")[masked]
    blocks = torch.zeros(len(x0), (length - 1) // size + 1, dtype=torch.double)
    blocks.index_add_(1, torch.arange(length) // size, values)
    return blocks.view(len(rows), samples, -1)


def masked_nll(
    model: Any, spec: Spec, x0: Tensor, masked: Tensor, doc: Tensor, pos: Tensor, suppressed: Tensor
) -> Tensor:
    """-log p(x0_i | xt) of every masked token, [N] in row-major order, on the CPU.

    Args:
        x0, doc, pos: [B, L]; masked: [B, L] bool (never position 0).
    """
    device = model.device
    x0, masked, doc, pos = (x.to(device) for x in (x0, masked, doc, pos))
    xt = torch.where(masked, spec.mask_token_id, x0)
    task = masked_task(x0, xt, masked, doc, pos, spec)
    logits = logits_at(model, task.index, **task.inputs(model, spec.local_window))
    head = head_of(model, spec)
    if head is not None:
        logits = logits + head(task.previous).to(logits)
    return cross_entropy(logits, task.target, suppressed.to(device)).cpu()


def _stratified_variance(values: Tensor) -> Tensor:
    """Variance of the mean over draws sorted by stratum, [R, samples, K] -> [R, K]: pairs of
    neighbouring strata are merged, which overestimates slightly. NaN for a single draw."""
    samples = values.shape[1]
    if samples == 1:
        return torch.full_like(values[:, 0], float("nan"))
    pairs = samples // 2
    difference = values[:, : 2 * pairs : 2] - values[:, 1 : 2 * pairs : 2]
    return difference.square().sum(1) / (4 * pairs**2)


@torch.no_grad()
def ar_nll(
    model: Any,
    rows: Sequence[Sequence[int]],
    suppressed: Tensor,
    local_window: str | None = None,
    batch_size: int = 32,
    starts: Sequence[int] | None = None,
) -> Estimate:
    """Exact -log p of each row from left to right, given its first token, under an AR model or
    mode.

    Args:
        starts: for each row, the first token that is scored, given all before it; None: the second.
    """
    starts = starts or [1] * len(rows)
    judged = [scored(row, suppressed, start) for row, start in zip(rows, starts, strict=True)]
    nats, greedy = [], []
    for first in range(0, len(rows), batch_size):
        part = slice(first, first + batch_size)
        found, right = _ar_part(model, rows[part], judged[part], suppressed, local_window)
        nats.append(found)
        greedy.append(right)
    nats = torch.cat(nats)
    tokens = torch.tensor([float(row.sum()) for row in judged])
    return Estimate(nats, torch.zeros_like(nats), tokens, torch.cat(greedy))


def _ar_part(
    model: Any,
    rows: Sequence[Sequence[int]],
    judged: Sequence[Tensor],
    suppressed: Tensor,
    local_window: str | None,
) -> tuple[Tensor, Tensor]:
    """Rows of one forward: [R] -log p of their judged tokens, and whether each of those is the
    likeliest. A last token is judged but not read, so that a row may have a token more than the
    context."""
    length = max(map(len, rows))
    x0 = torch.tensor([[*row, *[0] * (length - len(row))] for row in rows], device=model.device)
    wanted = torch.stack([torch.nn.functional.pad(j, (0, length - len(j))) for j in judged])
    wanted, read = wanted.to(model.device), max(1, length - 1)
    pos = torch.arange(length, device=model.device).expand_as(x0)
    real = pos < torch.tensor([len(row) for row in rows], device=model.device)[:, None]
    slots = Slots(torch.where(real, 0, PADDING), pos, torch.zeros_like(real))
    slots = Slots(*(x[:, :read] for x in (slots.doc, slots.pos, slots.noisy)))
    places = places_of(wanted)
    task = Task(
        x0[:, :read], slots, "causal_context", 1, slots_at(pos - 1, places, read), x0[wanted]
    )
    logits = logits_at(model, task.index, **task.inputs(model, local_window))
    ones = torch.ones(len(places), device=model.device)
    found = loss_of_logits(logits, task.target, ones, suppressed.to(model.device), len(places))
    nats = torch.zeros(x0.shape, dtype=torch.double, device=model.device)
    nats[wanted] = found.ce.double()
    right = torch.ones_like(wanted)
    right[wanted] = found.right
    return nats.sum(1).cpu(), right.all(1).cpu()
