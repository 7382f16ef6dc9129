"""Lossless self-speculation: the diffusion mode drafts, the AR mode of the same weights verifies.

Each forward holds a row's [newest token, drafts] causally, and after each of them a block of masks
that starts there:

    clean      t  d1  d2          the AR mode's distribution after t, d1, d2
    noisy      |t: m m m   |d1: m m m   |d2: m m m       drafts, whatever is accepted

The longest prefix of drafts that the AR mode agrees with is accepted, and one token of its own
follows; the block of masks behind the last accepted draft has the next drafts. So a forward yields
accepted + 1 tokens. With temperature, a draft is accepted with probability min(1, p / q) and else
replaced by a draw from max(p - q, 0) (Leviathan et al. 2023, algorithm 1): exact, since a draft is
drawn from one forward's q, each position on its own, independent of the tokens before it.
Without drafts this is plain AR decoding.
This file is copied into converted folders: it imports torch and its neighbours alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .attention import behind_context, layer_windows, model_mask
from .cache import ContextCache
from .canvas import Canvas, Finished
from .forward import logits_at
from .readers import slots_of
from .samplers import Chooser, draw, log_prob
from .spec import Spec


class _Rows:
    """What a batch of rows knows between two forwards.

    Attributes:
        rows: [R] global numbers.
        front: [R] tokens known, the newest not cached yet.
        drafts: [R, K] tokens drafted behind it; q: [R, K, V] what they were drawn from (sampling).
    """

    def __init__(self, canvas: Canvas):
        self.rows = torch.arange(len(canvas.ids))
        self.front = torch.tensor(canvas.front)
        self.drafts = torch.zeros(len(canvas.ids), 0, dtype=torch.long)
        self.q: Tensor | None = None

    def select(self, keep: Tensor) -> None:
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
    context: int | None = None,
    finished: Finished | None = None,
) -> Iterator[Canvas]:
    """Decode rows, yielding the canvas after every forward.

    Args:
        canvas: prompts without masks.
        drafts: tokens drafted behind each candidate, fewer than a block; 0 decodes one by one.
        context: positions that the model has; drafts beyond are not read.
    """
    state = _Rows(canvas)
    width = drafts + 1 if drafts else 0  # whole blocks draft no better, and cost more
    slots = (drafts + 1) * (width + 1)
    # The last drafts accepted may lie behind the canvas' end.
    static = canvas.ids.shape[1] + drafts + slots if cache == "static" else None
    kept = None if cache == "none" else ContextCache(model, len(state.rows), static)
    reader = _Reader(model, spec, kept, width, context)
    while canvas.unfinished:
        alive = ~canvas.done[state.rows]
        target, ahead = reader.read(canvas.ids[state.rows], state, drafts)
        canvas.forwards[state.rows] += alive
        accepted = _accept(canvas, state, chooser, target, ahead, alive, finished)
        reader.keep(accepted)
        yield canvas
        left = (~canvas.done[state.rows]).nonzero()[:, 0]
        if static is None and 0 < 2 * len(left) <= len(state.rows):
            if kept:
                kept.select(left)
            state.select(left)


@dataclass(frozen=True)
class _Layout:
    """Where the slots of a forward stand: [clean | a noisy block behind each candidate].

    With k drafts the clean slots end with the newest token and the drafts, at positions
    front - 1 .. front + k - 1; block j starts at front + j, as if j drafts were accepted.

    Attributes:
        pos: [R, S] positions less the row's front. start: [R, S] likewise. noisy: [S] bool.
        clean: how many slots are clean; wanted: [K] slots whose logits are read.
    """

    pos: Tensor
    start: Tensor
    noisy: Tensor
    clean: int
    wanted: Tensor

    @classmethod
    def of(cls, rows: int, certain: int, k: int, width: int, inside: Tensor) -> _Layout:
        """With `certain` tokens before the k drafts, and drafts read at `inside` [D] of a block."""
        candidate, clean = torch.arange(k + 1), certain + k
        start = candidate.repeat_interleave(width)
        ahead = start + torch.arange(width).repeat(k + 1)
        pos = torch.cat([torch.arange(clean) - certain, ahead]).expand(rows, -1)
        start = torch.cat([torch.arange(clean) - certain, start]).expand(rows, -1)
        behind = clean + candidate[:, None] * width + inside
        wanted = torch.cat([certain - 1 + candidate, behind.flatten()])
        return cls(pos, start, torch.arange(pos.shape[1]) >= clean, clean, wanted)


class _Reader:
    """Logits of the AR mode behind each candidate, and of the drafts that may follow."""

    def __init__(self, model: Any, spec: Spec, cache: Any, width: int, context: int | None):
        self.model, self.spec, self.cache, self.width = model, spec, cache, width
        self.last = (context or 1 << 60) - 1
        windows = layer_windows(model.config.get_text_config(), spec.local_window)
        self.uniform = not any(windows.values())  # a context is read whole
        self._steady: tuple[Any, _Layout, Any] | None = None

    def read(self, ids: Tensor, state: _Rows, drafts: int) -> tuple[Tensor, Tensor]:
        """Logits [R, k + 1, V] behind the newest token and each of k drafts, and [R, k + 1, drafts,
        V] of what may come behind the token that follows each."""
        rows, k, device = len(ids), state.drafts.shape[1], self.model.device
        length = self.cache.length if self.cache else torch.zeros_like(state.front)
        self.certain = state.front - length
        self.layout, mask = self._lay_out(state.front, length, k, drafts)
        layout, pos = self.layout, self.layout.pos + state.front[:, None]
        tokens = ids.new_full(pos.shape, self.spec.mask_token_id)
        first = layout.clean - k
        tokens[:, :first] = ids.gather(1, pos[:, :first].clamp(0, ids.shape[1] - 1))
        tokens[:, first : layout.clean] = state.drafts
        index = torch.arange(rows)[:, None] * pos.shape[1] + layout.wanted
        logits = logits_at(
            self.model,
            index.flatten().to(device),
            cache=self.cache.stock if self.cache else None,
            input_ids=tokens.to(device),
            attention_mask=mask,
            position_ids=pos.clamp(0, self.last).to(device),
        ).view(rows, layout.wanted.shape[0], -1)
        ahead = logits[:, k + 1 :].reshape(rows, k + 1, drafts, logits.shape[-1])
        return logits[:, : k + 1], ahead

    def keep(self, accepted: Tensor) -> None:
        """The tokens that were certain and the accepted drafts [R] become context."""
        if self.cache:
            layout = self.layout
            first = int((layout.pos[0, : layout.clean] < 0).sum()) - self.certain
            self.cache.keep(layout.pos.shape[1], first, self.certain + accepted)

    def _lay_out(self, front: Tensor, length: Tensor, k: int, drafts: int) -> tuple[_Layout, Any]:
        """The slots, and the mask over the context and them. Once each row has one certain token
        and as many drafts, only the context grows: what stands behind it is laid out once."""
        rows, certain = len(front), int(self.certain.max())
        beyond = int(front.max()) + k + self.width > self.last
        steady = self.uniform and not beyond and bool((self.certain == certain).all())
        key = (rows, certain, k)
        seen = torch.arange(self.cache.width if self.cache else 0) < length[:, None]
        if not steady or self._steady is None or self._steady[0] != key:
            inside = torch.arange(drafts) + (0 if self.spec.prediction == "shift" else 1)
            layout = _Layout.of(rows, certain, k, self.width, inside)
            if not steady:
                return layout, self._mask(layout, front, length, seen)
            none = seen[:, :0]
            self._steady = (key, layout, self._mask(layout, front, length, none))
        _, layout, mask = self._steady
        if self.cache is None or self.cache.static is None:
            return layout, behind_context(mask, seen.to(mask.device))
        return layout, self._mask(layout, front, length, seen)

    def _mask(self, layout: _Layout, front: Tensor, length: Tensor, seen: Tensor) -> Any:
        """The mask of the slots, behind the columns `seen` [R, C] of the context."""
        pos, columns = layout.pos + front[:, None], seen.shape[1]
        slots = pos.shape[1]
        static = self.cache is not None and self.cache.static is not None
        built = slots_of(
            self.cache.static if static else columns + slots,
            seen,
            torch.arange(columns).expand(len(pos), -1),
            (pos >= length[:, None]) & (pos <= self.last),
            pos,
            layout.noisy.expand(len(pos), -1),
            self.model.device,
            layout.start + front[:, None],
        )
        return model_mask(
            self.model, built, "causal_context", self.spec.block_length, self.spec.local_window,
            queries=range(columns, columns + slots),
        )  # fmt: skip


def _accept(
    canvas: Canvas,
    state: _Rows,
    chooser: Chooser,
    target: Tensor,
    ahead: Tensor,
    alive: Tensor,
    finished: Finished | None,
) -> Tensor:
    """Write each row's accepted drafts and one more token, and draft behind it.

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
    state: _Rows, chooser: Chooser, p: Tensor, alive: Tensor
) -> tuple[Tensor, Tensor]:
    """Tokens [R, k + 1] and how many drafts are accepted [R], such that the tokens up to the one
    behind the accepted drafts are draws from p [R, k + 1, V]."""
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


def _draft(canvas: Canvas, state: _Rows, chooser: Chooser, logits: Tensor, drafts: int) -> None:
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
    canvas: Canvas, state: _Rows, row: Tensor, position: Tensor, chooser: Chooser
) -> Tensor | None:
    """[N, T] what stands before each position, drafts included; the mask elsewhere."""
    if chooser.penalty is None:
        return None
    ids = canvas.ids[state.rows]
    place = state.front[:, None] + torch.arange(state.drafts.shape[1])
    ids = torch.cat([ids, torch.zeros_like(state.drafts)], 1).scatter(1, place, state.drafts)[row]
    return ids.masked_fill(torch.arange(ids.shape[1]) >= position[:, None], canvas.mask_token_id)
