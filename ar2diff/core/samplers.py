"""Choosing a token for each position, and which positions to decide at a step.

Confidence is measured in the model's own distribution, before temperature and filters: a low
temperature would otherwise decide more tokens at once, silently. Positions compete within their row
only.

Ties go to the earlier position. Positions that read masks alone have the same distribution, and
rounding, which differs with the CPU and the shape of the batch, must not decide between them. So
confidences and entropies (in nats) and margins are ranked as equal if they lie within `TIE` of
each other, and a threshold or an entropy bound must be passed by more than that. In float32, whose
rounding moves them by about 1e-5, and in float64, a text depends on neither CPU nor batch by a tie;
bfloat16 rounds more coarsely than any difference that could be ignored. Between tokens of one
position, equal scores go to the lowest id.

This file is copied into converted folders: it imports torch, transformers and its neighbours alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .head import BigramHead
from .options import Options
from .transfer import download, upload

HIDDEN = float("-inf")
TIE = 1e-4  # below it, a difference of scores counts as rounding


@dataclass(frozen=True)
class Choice:
    """Tokens [N] for N positions, and how sure the model is of each.

    Attributes:
        logprob: log-probability of the token in the model's own distribution.
        margin: probability of the likeliest token minus that of the second.
        entropy: of the model's own distribution, in nats.
    """

    tokens: Tensor
    logprob: Tensor
    margin: Tensor | None = None
    entropy: Tensor | None = None

    def on_host(self) -> Choice:
        """The same, on the CPU."""
        there = {name: x for name, x in vars(self).items() if x is not None}
        return Choice(**dict(zip(there, download(*there.values()), strict=True)))


@dataclass(frozen=True)
class Context:
    """What stands around N positions.

    Attributes:
        ids: [N, L] the tokens of each one's row, the mask where undecided.
        position: [N] where in it.
        tentative: [N] bool, those behind candidates, which may not be accepted; None: none are.
    """

    ids: Tensor
    position: Tensor
    tentative: Tensor | None = None

    def at(self, places: Tensor) -> Context:
        """What stands around some of the positions."""
        return Context(*(None if x is None else x[places] for x in vars(self).values()))

    def to(self, device: Any) -> Context:
        """The same on a device."""
        there = {name: x for name, x in vars(self).items() if x is not None}
        return Context(**dict(zip(there, upload(device, *there.values()), strict=True)))


class Chooser:
    """Chooses tokens from logits.

    Args:
        suppressed: [K] int, ids that no position can hold.
        generators: one for each row of the batch; unused if sampling is greedy.
        warpers: processors of transformers that look at each position alone.
        readers: those among the warpers that look at a `Context`, called with it and scores [N, V].
    """

    def __init__(
        self,
        options: Options,
        suppressed: Tensor,
        generators: Sequence[torch.Generator],
        warpers: Sequence[Any] = (),
        readers: Sequence[Any] = (),
    ):
        self.options, self.suppressed = options, suppressed
        self.generators, self.warpers, self.readers = generators, warpers, readers

    def possible(self, logits: Tensor, no_end: Tensor | None, end_ids: Tensor) -> Tensor:
        """Logits [N, V] of the model's own distribution: impossible tokens at -inf.

        Args:
            no_end: [N] bool, positions that may not hold an end token.
        """
        logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
        if len(self.suppressed) or no_end is not None:  # else nothing is impossible
            logits = logits.index_fill(1, self.suppressed, HIDDEN)
        if no_end is not None and len(end_ids):
            held, ends = upload(logits.device, no_end, end_ids)
            logits[:, ends] = logits[:, ends].masked_fill(held[:, None], HIDDEN)
        return logits

    def warp(self, logits: Tensor, context: Context | None) -> Tensor:
        """Scores [N, V] after biases, penalties, guide, temperature and filters.

        Args:
            context: of the positions; None: what reads it is left out.
        """
        scores = logits
        if context is not None:
            context = context.to(scores.device)
        for warper in self.warpers:
            if warper not in self.readers:
                scores = warper(None, scores)
            elif context is not None:
                scores = warper(context, scores)
        return scores

    def choose(self, logits: Tensor, row: Tensor, context: Context | None = None) -> Choice:
        """Tokens for positions of rows `row` [N] (global numbers), from `possible` logits, on the
        CPU."""
        u = None if self.options.greedy else self.uniform(row)
        return self.pick(logits, u, context).on_host()

    def pick(self, logits: Tensor, u: Tensor | None, context: Context | None = None) -> Choice:
        """The same on the device of the logits, with the numbers [N] in [0, 1) that decide the
        draws; None if it is greedy."""
        scores = self.warp(logits, context)
        if u is None:
            tokens = scores.argmax(-1)  # of equal ones, the first
        else:
            tokens = draw(scores.softmax(-1), u)
        return self.measured(logits, tokens)

    def measured(self, logits: Tensor, tokens: Tensor) -> Choice:
        """Tokens [N] with what the order and the rule of the options ask of their distributions,
        logits [N, V]."""
        margin = entropy = None
        if self.options.order == "margin":
            top = logits.softmax(-1).topk(2, -1).values
            margin = top[:, 0] - top[:, 1]
        if self.options.order == "entropy" or self.options.entropy_bound is not None:
            entropy = torch.special.entr(logits.softmax(-1)).sum(-1)
        return Choice(tokens, log_prob(logits, tokens), margin, entropy)

    def uniform(self, row: Tensor) -> Tensor:
        """[N] numbers in [0, 1), each from its row's own generator, so that a row draws the same
        numbers in every batch. `row` is sorted."""
        rows, counts = row.unique_consecutive(return_counts=True)
        draws = [
            torch.rand(n, generator=self.generators[r], dtype=torch.double)
            for r, n in zip(rows.tolist(), counts.tolist(), strict=True)
        ]
        return torch.cat(draws) if draws else torch.zeros(0, dtype=torch.double)


def log_prob(logits: Tensor, tokens: Tensor) -> Tensor:
    """[N] log-probabilities of tokens [N] under logits [N, V]."""
    return logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]


def likeliest(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """[N, count] the likeliest tokens under logits [N, V], and their log-probabilities."""
    best = logits.log_softmax(-1).topk(min(count, logits.shape[-1]), -1)
    return best.indices, best.values


def draw(probability: Tensor, u: Tensor) -> Tensor:
    """[N] tokens by inversion: the first whose cumulative probability exceeds u.

    Args:
        probability: [N, V], not necessarily normalized.
        u: [N] in [0, 1).
    """
    cumulative = probability.double().cumsum(-1)
    (u,) = upload(cumulative.device, u)
    point = u[:, None] * cumulative[:, -1:]
    token = torch.searchsorted(cumulative, point, right=True)[:, 0]
    last = (probability > 0).double().cumsum(-1).argmax(-1)  # rounding may point beyond it
    return torch.minimum(token, last)


def commits(
    options: Options,
    choice: Choice,
    masked: Tensor,
    quota: Tensor | None,
    chooser: Chooser,
    rows: Tensor,
) -> Tensor:
    """The masked positions to decide now, [R, W] bool, on the device of the choice: at least one in
    each row that has any.

    Args:
        choice: for the masked positions in row-major order.
        masked: [R, W] bool.
        quota: [R] the least number that `steps_per_block` asks for; None without it.
        rows: [R] global numbers of the rows.
    """
    device, order = choice.tokens.device, None
    if quota is not None:
        if options.order == "random":
            (order,) = upload(device, chooser.uniform(rows[masked.nonzero()[:, 0]]))
        (quota,) = upload(device, quota)
    (masked,) = upload(device, masked)
    confidence = spread(choice.logprob, masked)
    if options.entropy_bound is not None:
        return within_entropy(spread(choice.entropy, masked), masked, options.entropy_bound)
    if quota is None:
        return over_threshold(confidence, masked, options.threshold)
    tie = TIE
    if order is not None:
        score, tie = order, 0.0  # draws are not rounded
    elif options.order == "margin":
        score = choice.margin
    elif options.order == "entropy":
        score = -choice.entropy
    else:
        score = choice.logprob
    best = top(spread(score, masked), masked, quota, tie)
    if options.threshold is None:
        return best
    sure = masked & surer(confidence, options.threshold)  # SDAR: threshold or quota
    return torch.where((sure.sum(1) >= quota)[:, None], sure, best)


def left_to_right(
    head: BigramHead,
    chooser: Chooser,
    logits: Tensor,
    u: Tensor | None,
    context: Context | None,
    choice: Choice,
    masked: Tensor,
    commit: Tensor,
) -> tuple[Choice, Tensor]:
    """Have each token that is decided at this step know the one decided before it.

    The masked positions are visited from left to right. Where the left neighbour is decided at this
    step, the token is chosen again, with the same random number, from its logits plus the head's
    bias. If the threshold alone decides how many tokens a step takes, such a token is decided if it
    passes the threshold in *that* distribution, whether it did without the bias or not. The first
    of a run of neighbours is never chosen again, so at least one token of a row stays. Quotas and
    entropy bounds have decided which positions; those are kept.

    Args:
        logits: [N, V] of the masked positions, without biases for tokens of this step.
        u, context: what `choice` was picked with.
        masked: [R, W] bool, on the CPU. commit: [R, W] bool, on the device of the logits.

    Returns:
        The choice, with the tokens and log-probabilities that are decided, and where, [R, W] bool.
    """
    options = chooser.options
    alone = options.steps_per_block is None and options.entropy_bound is None
    number = spread(torch.arange(len(logits)), masked)
    commit, tokens, logprob = commit.clone(), choice.tokens.clone(), choice.logprob.clone()
    for column in range(1, masked.shape[1]):
        chosen = masked[:, column]
        if commit.is_cpu:  # a device's are not known here: it chooses for all rows, and keeps some
            chosen = chosen & commit[:, column - 1] & (alone | commit[:, column])
        rows = chosen.nonzero()[:, 0]
        if not len(rows):
            continue
        rows, here, left = upload(
            logits.device, rows, number[rows, column], number[rows, column - 1]
        )
        again = commit[rows, column - 1] & (alone | commit[rows, column])
        part = logits[here] + head(tokens[left]).to(logits)
        picked = chooser.pick(
            part,
            None if u is None else u[here],
            None if context is None else context.at(here),
        )
        tokens[here] = torch.where(again, picked.tokens, tokens[here])
        logprob[here] = torch.where(again, picked.logprob, logprob[here])
        if alone:
            sure = surer(picked.logprob, options.threshold)
            commit[rows, column] = torch.where(again, sure, commit[rows, column])
    return replace(choice, tokens=tokens, logprob=logprob), commit


def surer(logprob: Tensor, threshold: float) -> Tensor:
    """Bool, where a probability exceeds the threshold by more than rounding: its log-odds, which
    rounding moves as much as it moves logits, exceed the threshold's by `TIE`."""
    if threshold <= 0:
        return logprob > HIDDEN
    return logprob > math.log(threshold) + TIE * max(1 - threshold, 0)


def over_threshold(logprob: Tensor, masked: Tensor, threshold: float) -> Tensor:
    """Every token surer than the threshold, or the surest of a row if there is none (Fast-dLLM, Wu
    et al. 2025).

    Args:
        logprob, masked: [R, W], of the chosen tokens.
    """
    sure = masked & surer(logprob, threshold)
    none = masked.any(1) & ~sure.any(1)
    if none.is_cpu and not none.any():  # a device would have to be asked
        return sure
    return sure | top(logprob, masked, none.long())


def within_entropy(entropy: Tensor, masked: Tensor, bound: float) -> Tensor:
    """The largest set, in order of entropy, whose joint entropy exceeds its largest member's by at
    most the bound: sum of H - max of H <= bound (EB-sampler, Ben-Hamu et al. 2025, eq. 9).

    Args:
        entropy, masked: [R, W].
    """
    order = ranked(-entropy, masked)
    ordered = entropy.masked_fill(~masked, 0.0).gather(1, order)
    within = ordered.cumsum(1) - ordered <= bound + TIE
    within[:, 0] = True
    return masked & torch.zeros_like(masked).scatter(1, order, within)


def top(score: Tensor, masked: Tensor, count: Tensor, tie: float = TIE) -> Tensor:
    """The `count` [R] masked positions of each row with the highest score [R, W]."""
    order = ranked(score, masked, tie)
    place = torch.arange(order.shape[1], device=order.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(1, order, place)
    return masked & (rank < count[:, None])


def ranked(score: Tensor, masked: Tensor, tie: float = TIE) -> Tensor:
    """[R, W] positions of each row from the highest score [R, W] to the lowest, the masked ones
    before the others; ties from the left.

    Scores tie if none of the gaps between them, in the order of the row's scores, exceeds `tie`.
    Rounding each score to a grid would not do: equal scores can lie on both sides of a step.
    """
    ordered, order = score.masked_fill(~masked, HIDDEN).sort(dim=1, descending=True, stable=True)
    gaps = ordered[:, :-1] - ordered[:, 1:] > tie  # of two at -inf there is none
    group = torch.nn.functional.pad(gaps.long().cumsum(1), (1, 0)) + (~masked).gather(1, order)
    return order.gather(1, (group * order.shape[1] + order).argsort(1))


def quota_of(total: Tensor, steps: int, taken: Tensor, left: Tensor) -> Tensor:
    """[R] tokens to decide at a step: n tokens in S steps make n // S at each, and one more at the
    first n % S (LLaDA, Nie et al. 2025); besides those that were masked again, and at least one.

    Args:
        total: [R] tokens that the block had to decide in all.
        taken: [R] steps already taken in it.
        left: [R] tokens undecided now.
    """
    share = total // steps + (taken < total % steps).long()
    planned = total - (total // steps * (taken + 1) + torch.minimum(taken + 1, total % steps))
    return torch.maximum(share, left - planned.clamp(min=0)).clamp(min=1)


def spread(values: Tensor, masked: Tensor) -> Tensor:
    """[N] values of the masked positions in their places [R, W], zero elsewhere."""
    held = torch.zeros(masked.shape, dtype=values.dtype, device=values.device)
    return held.masked_scatter(masked, values)
