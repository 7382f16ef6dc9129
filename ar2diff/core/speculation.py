"""Lossless self-speculation: the diffusion mode drafts, the AR mode of the same weights verifies.

Each forward holds a row's [newest token, drafts] causally, and after each of them a block of masks
that starts there:

    clean      t  d1  d2          the AR mode's distribution after t, d1, d2
    noisy      |t: m m m   |d1: m m m   |d2: m m m       drafts, whatever is accepted

The longest prefix of drafts that the AR mode agrees with is accepted, and one token of its own
follows; the block of masks after the last accepted draft holds the next drafts. So a forward yields
accepted + 1 tokens. With temperature, a draft is accepted with probability min(1, p / q) and
otherwise replaced by a draw from max(p - q, 0) (Leviathan et al. 2023, algorithm 1): exact, since a
draft is drawn from one forward's q, each position on its own, independent of the tokens before it.
Without drafts this is plain AR decoding.
This file is copied into converted folders: it imports torch and its neighbours alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .candidates import CandidateReader
from .canvas import Canvas, Finished
from .forward import context_length, rope_regime, rope_switches
from .samplers import Chooser, draw, log_prob
from .spec import Spec


class _Group:
    """Rows that are read together, and what is known of them between two forwards.

    Attributes:
        rows: [R] global numbers.
        front: [R] tokens known, the newest not cached yet.
        drafts: [R, K] tokens drafted after it; q: [R, K, V] what they were drawn from (sampling).
        zone: of `_zones`.
    """

    def __init__(
        self,
        model: Any,
        spec: Spec,
        canvas: Canvas,
        rows: Tensor,
        zone: int,
        drafts: int,
        cache: str,
    ):
        self.rows, self.zone = rows, zone
        self.front = torch.tensor(canvas.front)[rows]
        self.drafts = torch.zeros(len(rows), 0, dtype=torch.long)
        self.q: Tensor | None = None
        self.most = drafts
        self.reader = CandidateReader(
            model, spec, len(rows), canvas.ids.shape[1], drafts, cache, context_length(model.config)
        )

    def step(self, canvas: Canvas, chooser: Chooser, finished: Finished | None) -> None:
        """Forward the rows once, accept drafts and draft anew."""
        alive = ~canvas.done[self.rows]
        target, ahead = self.reader.read(canvas.ids[self.rows], self.front, self.drafts)
        canvas.forwards[self.rows] += alive
        self.reader.keep(_accept(canvas, self, chooser, target, ahead, alive, finished))

    def select(self, keep: Tensor) -> None:
        """Continue with some of the rows."""
        self.reader.select(keep)
        self.rows, self.front, self.drafts = self.rows[keep], self.front[keep], self.drafts[keep]
        if self.q is not None:
            self.q = self.q[keep.to(self.q.device)]


def speculate(
    model: Any,
    spec: Spec,
    canvas: Canvas,
    chooser: Chooser,
    *,
    drafts: int,
    cache: str = "dynamic",
    finished: Finished | None = None,
) -> Iterator[Canvas]:
    """Decode rows, yielding the canvas after every forward.

    Args:
        canvas: prompts without masks.
        drafts: tokens drafted after each candidate, fewer than a block; 0 decodes one by one.
    """
    switches = rope_switches(model.config)

    def found(rows: Tensor, zones: Tensor) -> list[_Group]:
        """New groups of rows [R], one for each zone."""
        return [
            _Group(model, spec, canvas, rows[zones == zone], zone, 0 if zone % 2 else drafts, cache)
            for zone in zones.unique().tolist()
        ]

    front = torch.tensor(canvas.front)
    groups = found(torch.arange(len(front)), _zones(front, drafts, switches))
    while canvas.unfinished:
        for group in groups:
            group.step(canvas, chooser, finished)
        yield canvas
        kept: list[_Group] = []
        for group in groups:
            zones = _zones(group.front, drafts, switches)
            alive, stay = ~canvas.done[group.rows], zones == group.zone
            kept += found(group.rows[alive & ~stay], zones[alive & ~stay])
            left = (alive & stay).nonzero()[:, 0]
            if not len(left):
                continue
            few = cache != "static" and 2 * len(left) <= len(group.rows)
            if few or not stay.all():
                group.select(left)
            kept.append(group)
        groups = kept


def _zones(front: Tensor, drafts: int, switches: tuple[int, ...]) -> Tensor:
    """[R] which rows can be read together, where the model's rotary factors change with the length
    of the longest row: twice the regime of `rope_regime`, plus one if drafts would reach beyond its
    end. Such rows decode without drafts, as their AR mode would, until they have passed it."""
    if not switches:
        return torch.zeros_like(front)
    now = rope_regime(front, switches)
    reach = 2 * drafts + 1 if drafts else 0  # of the block after the last draft
    return 2 * now + (rope_regime(front + reach, switches) != now)


def _accept(
    canvas: Canvas,
    state: _Group,
    chooser: Chooser,
    target: Tensor,
    ahead: Tensor,
    alive: Tensor,
    finished: Finished | None,
) -> Tensor:
    """Write each row's accepted drafts and one more token, and draft what follows.

    Returns:
        [R] how many drafts were accepted (0 in rows that were finished before).
    """
    rows, k, drafts = len(state.rows), state.drafts.shape[1], ahead.shape[2]
    row = torch.arange(rows).repeat_interleave(k + 1)
    position = (state.front[:, None] + torch.arange(k + 1)).flatten()
    no_end = position < canvas.end_from[state.rows[row]] if canvas.held else None
    logits = chooser.possible(target.flatten(0, 1), no_end, canvas.end_ids)
    scores = chooser.warp(logits, _context(canvas, state, row, position, chooser))
    if chooser.options.greedy:
        tokens = scores.argmax(-1).cpu().view(rows, k + 1)
        agreed = tokens[:, :k] == state.drafts
        accepted = agreed.long().cumprod(1).sum(1)
    else:
        tokens, accepted = _speculative_draws(
            state, chooser, scores.softmax(-1).view(rows, k + 1, -1), alive
        )
    accepted = torch.where(alive, accepted, 0)
    logprob = log_prob(logits, tokens.flatten().to(logits.device)).cpu().view(rows, k + 1)
    new = (torch.arange(k + 1) <= accepted[:, None]) & alive[:, None]
    new &= position.view(rows, k + 1) < canvas.total[state.rows, None]
    at = new.nonzero()
    canvas.write(
        state.rows[at[:, 0]], position.view(rows, k + 1)[new], tokens[new], logprob[new], finished
    )
    state.front = state.front + torch.where(alive, accepted + 1, 0)
    chosen = ahead[torch.arange(rows), accepted]
    _draft(canvas, state, chooser, chosen, drafts)
    return accepted


def _speculative_draws(
    state: _Group, chooser: Chooser, p: Tensor, alive: Tensor
) -> tuple[Tensor, Tensor]:
    """Tokens [R, k + 1] and how many drafts are accepted [R], such that the tokens up to the one
    after the accepted drafts are draws from p [R, k + 1, V]."""
    rows, k = state.drafts.shape
    p = p.cpu().double()
    tokens = torch.cat([state.drafts, torch.zeros(rows, 1, dtype=torch.long)], 1)
    accepted = torch.zeros(rows, dtype=torch.long)
    for r in alive.nonzero()[:, 0].tolist():
        u = chooser.uniform(state.rows[r].repeat(k + 1))
        rest, a = p[r, k], 0
        while a < k:
            q, token = state.q[r, a], int(state.drafts[r, a])
            if u[a] * q[token] >= p[r, a, token]:
                rest = (p[r, a] - q).clamp(min=0)
                rest = rest if rest.sum() > 0 else p[r, a]  # p == q, apart by rounding
                break
            a += 1
        accepted[r] = a
        tokens[r, a] = draw(rest[None], u[k:])[0]
    return tokens, accepted


def _draft(canvas: Canvas, state: _Group, chooser: Chooser, logits: Tensor, drafts: int) -> None:
    """Draft [R, drafts] tokens from their logits [R, drafts, V], each on its own."""
    rows = len(logits)
    if not drafts:
        return
    position = (state.front[:, None] + torch.arange(drafts)).flatten()
    row = torch.arange(rows).repeat_interleave(drafts)
    no_end = position < canvas.end_from[state.rows[row]] if canvas.held else None
    scores = chooser.warp(chooser.possible(logits.flatten(0, 1), no_end, canvas.end_ids), None)
    if chooser.options.greedy:
        state.drafts = scores.argmax(-1).cpu().view(rows, drafts)
        return
    q = scores.softmax(-1)
    state.drafts = draw(q, chooser.uniform(state.rows[row])).cpu().view(rows, drafts)
    state.q = q.cpu().double().view(rows, drafts, -1)


def _context(
    canvas: Canvas, state: _Group, row: Tensor, position: Tensor, chooser: Chooser
) -> Tensor | None:
    """[N, T] what stands before each position, drafts included; the mask elsewhere."""
    if chooser.penalty is None:
        return None
    ids = canvas.ids[state.rows]
    place = state.front[:, None] + torch.arange(state.drafts.shape[1])
    ids = torch.cat([ids, torch.zeros_like(state.drafts)], 1).scatter(1, place, state.drafts)[row]
    return ids.masked_fill(torch.arange(ids.shape[1]) >= position[:, None], canvas.mask_token_id)
