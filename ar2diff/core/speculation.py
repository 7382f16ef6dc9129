"""Lossless speculation: masks draft what may follow, and the model's own AR mode verifies it.

Each forward holds a row's newest token and candidates, of which some are followed by masks:

    clean      t  d1  d2          the AR mode's distribution after t, d1, d2
    noisy      |t: m m m   |d1: m m m   |d2: m m m       drafts, whatever is accepted

Candidates may form a chain or a tree. The AR mode's token after t is drawn; if a candidate that
follows t holds that token, it is accepted, the token after it is drawn, and so on. So a forward
yields accepted + 1 tokens, all of them drawn from the AR mode's own distribution, whatever the
drafts were. The noise of a draw belongs to its position (gumbel.py): a text is the one that plain
AR decoding writes with the same seed, at any temperature, up to rounding between two tokens that
are equally likely. Without drafts this is plain AR decoding.
This file is copied into converted folders: it imports torch and its neighbours alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .candidates import CandidateReader
from .canvas import Canvas, Finished
from .draft import Draft
from .forward import context_length, rope_regime, rope_switches
from .gumbel import GumbelNoise
from .pace import Pace
from .samplers import Chooser, log_prob
from .spec import Spec
from .tree import Guesses, Tree


class Speculation:
    """Decodes rows from left to right.

    Args:
        canvas: prompts without masks.
        pace: how many candidates and masks a forward holds.
        draft: the draft adapter, if the model has one.
        cache: `dynamic`, `static` or `none`.
    """

    def __init__(
        self,
        model: Any,
        spec: Spec,
        canvas: Canvas,
        chooser: Chooser,
        pace: Pace,
        *,
        draft: Draft | None = None,
        cache: str = "dynamic",
        finished: Finished | None = None,
    ):
        self.model, self.spec, self.canvas, self.chooser = model, spec, canvas, chooser
        self.pace, self.draft, self.cache, self.finished = pace, draft, cache, finished
        self.switches = rope_switches(model.config)
        vocabulary = model.config.get_text_config().vocab_size
        greedy = chooser.options.greedy
        self.noise = None if greedy else GumbelNoise(chooser.generators, vocabulary)

    def run(self) -> Iterator[Canvas]:
        """Decode, yielding the canvas after every forward."""
        canvas = self.canvas
        front = torch.tensor(canvas.front)
        groups = self._found(torch.arange(len(front)), self._zones(front))
        while canvas.unfinished:
            for group in groups:
                group.step()
            yield canvas
            groups = self._regrouped(groups)

    def _found(self, rows: Tensor, zones: Tensor) -> list[_Group]:
        """New groups of rows [R], one for each zone."""
        return [_Group(self, rows[zones == zone], zone) for zone in zones.unique().tolist()]

    def _regrouped(self, groups: list[_Group]) -> list[_Group]:
        """Groups without the rows that have finished, once they are half of theirs, and with rows
        that have come to another zone in groups of their own."""
        kept: list[_Group] = []
        for group in groups:
            alive = ~self.canvas.done[group.rows]
            if not self.switches and alive.all():
                kept.append(group)
                continue
            zones = self._zones(group.front)
            stay = zones == group.zone
            kept += self._found(group.rows[alive & ~stay], zones[alive & ~stay])
            left = (alive & stay).nonzero()[:, 0]
            if not len(left):
                continue
            few = self.cache != "static" and 2 * len(left) <= len(group.rows)
            if few or not stay.all():
                group.select(left)
            kept.append(group)
        return kept

    def _zones(self, front: Tensor) -> Tensor:
        """[R] which rows can be read together, where the model's rotary factors change with the
        length of the longest row: twice the regime of `rope_regime`, plus one if drafts would reach
        beyond its end. Such rows decode without drafts, as their AR mode would, until they have
        passed it."""
        if not self.switches:
            return torch.zeros_like(front)
        now = rope_regime(front, self.switches)
        reach = self.pace.reach  # of the block after the last draft
        return 2 * now + (rope_regime(front + reach, self.switches) != now)


class _Group:
    """Rows that are read together, and what is known of them between two forwards.

    Attributes:
        rows: [R] global numbers.
        front: [R] tokens known, the newest not cached yet.
        trees: candidates for what follows, and the masks behind them.
        drafts: how many tokens are drafted behind each.
        zone: of `_zones`.
    """

    def __init__(self, own: Speculation, rows: Tensor, zone: int):
        canvas = own.canvas
        self.own, self.rows, self.zone = own, rows, zone
        self.front = torch.tensor(canvas.front)[rows]
        self.pace = own.pace if zone % 2 == 0 else Pace.without_drafts()
        self.trees = [Tree() for _ in rows]
        self.drafts = self.pace.drafts(len(rows))
        self.reader = CandidateReader(
            own.model, own.spec, len(rows), canvas.ids.shape[1], own.cache,
            context_length(own.model.config), self.pace.most, own.draft,
        )  # fmt: skip

    def step(self) -> None:
        """Forward the rows once, accept candidates and draft anew."""
        canvas, rows = self.own.canvas, self.rows
        alive = ~canvas.done[rows]
        target, ahead = self.reader.read(canvas.ids[rows], self.front, self.trees, self.drafts)
        canvas.forwards[rows] += alive
        tokens, logits = self._tokens(target)
        ends = [
            tree.walk(own) if live else -1
            for tree, own, live in zip(self.trees, tokens.tolist(), alive.tolist(), strict=True)
        ]
        paths = [tree.path(end) for tree, end in zip(self.trees, ends, strict=True)]
        self.reader.keep(paths)
        self._write(paths, tokens, logits, alive)
        newest = tokens[torch.arange(len(rows)), torch.tensor(ends) + 1]
        self.front = self.front + torch.where(alive, torch.tensor([len(p) + 1 for p in paths]), 0)
        self._draft(ends, newest, ahead)

    def select(self, keep: Tensor) -> None:
        """Continue with some of the rows."""
        self.reader.select(keep)
        self.rows, self.front = self.rows[keep], self.front[keep]
        self.trees = [self.trees[row] for row in keep.tolist()]

    def _tokens(self, target: Tensor) -> tuple[Tensor, Tensor]:
        """The AR mode's tokens [R, N + 1] after the newest token and each candidate, and the logits
        [R * (N + 1), V] of possible tokens from which they were drawn."""
        canvas, chooser = self.own.canvas, self.own.chooser
        count, size = target.shape[:2]
        line = torch.arange(count).repeat_interleave(size)
        depths = torch.tensor([[0, *t.depths, *[0] * (size - 1 - len(t))] for t in self.trees])
        position = (self.front[:, None] + depths).flatten()
        no_end = position < canvas.end_from[self.rows[line]] if canvas.held else None
        logits = chooser.possible(target.flatten(0, 1), no_end, canvas.end_ids)
        scores = chooser.warp(logits, self._contexts(size))
        if self.own.noise is not None:
            noise = self.own.noise.at(self.rows[line].tolist(), position.tolist())
            scores = scores + noise.to(scores.device)
        return scores.argmax(-1).cpu().view(count, size), logits

    def _write(self, paths: list[list[int]], tokens: Tensor, logits: Tensor, alive: Tensor) -> None:
        """Write each row's accepted candidates, and the token after them."""
        canvas, size = self.own.canvas, tokens.shape[1]
        lines, places, positions = [], [], []
        totals, fronts = canvas.total[self.rows].tolist(), self.front.tolist()
        for line, (path, live) in enumerate(zip(paths, alive.tolist(), strict=True)):
            room = totals[line] - fronts[line] if live else 0
            taken = [0, *(node + 1 for node in path)][:room]
            lines += [line] * len(taken)
            places += taken
            positions += range(fronts[line], fronts[line] + len(taken))
        line, place = torch.tensor(lines), torch.tensor(places)
        found = tokens[line, place]
        chosen = (line * size + place).to(logits.device)
        logprob = log_prob(logits[chosen], found.to(logits.device)).cpu()
        rows = self.rows[line]
        canvas.write(rows, torch.tensor(positions), found, logprob, self.own.finished)

    def _draft(self, ends: list[int], newest: Tensor, ahead: Tensor) -> None:
        """New candidates for what follows the newest token of each row.

        Args:
            ends: the node at which each row's walk ended. newest: [R] the token after it.
            ahead: [R, M, K, V] draft logits behind the candidates with masks.
        """
        drafts, self.drafts = self.drafts, self.pace.drafts(len(self.rows))
        blocks = [
            tree.blocks.index(end) if drafts and end in tree.blocks else -1
            for tree, end in zip(self.trees, ends, strict=True)
        ]
        self.trees = [Tree() for _ in blocks]
        have = [row for row, block in enumerate(blocks) if block >= 0]
        if not have:
            return self.pace.plan(self.trees, self.drafts)
        at = torch.tensor(have)
        logits = ahead[at, torch.tensor([blocks[row] for row in have])]
        guesses = self._guesses(at, newest[at], logits)
        for row, tree in zip(have, self.pace.grown(guesses), strict=True):
            self.trees[row] = tree
        self.pace.plan(self.trees, self.drafts)

    def _guesses(self, at: Tensor, newest: Tensor, logits: Tensor) -> Guesses:
        """Guesses from the draft logits [R', K, V] of some rows."""
        canvas, chooser = self.own.canvas, self.own.chooser
        count, drafts = logits.shape[:2]
        rows = self.rows[at].repeat_interleave(drafts)
        position = (self.front[at, None] + torch.arange(drafts)).flatten()
        no_end = position < canvas.end_from[rows] if canvas.held else None
        logits = chooser.possible(logits.flatten(0, 1), no_end, canvas.end_ids)
        scores = chooser.warp(logits, None)
        if self.own.noise is not None:
            noise = self.own.noise.at(rows.tolist(), position.tolist())
            scores = scores + noise.to(scores.device)
        head = None if self.own.draft is None else self.own.draft.head
        temperature = chooser.options.temperature or 1.0
        return Guesses.of(scores.view(count, drafts, -1), newest, head, temperature)

    def _contexts(self, size: int) -> Tensor | None:
        """[R * size, T] what stands before the token after the newest token and each candidate,
        candidates included; the mask elsewhere."""
        canvas = self.own.canvas
        if self.own.chooser.penalty is None:
            return None
        ids = canvas.ids[self.rows]
        longest = max((max(tree.depths) for tree in self.trees if len(tree)), default=0)
        blank = torch.full((len(ids), longest), canvas.mask_token_id)
        ids = torch.cat([ids, blank], 1)
        ids = ids.masked_fill(
            torch.arange(ids.shape[1]) >= self.front[:, None], canvas.mask_token_id
        )
        ids = ids[:, None].repeat(1, size, 1)
        for line, tree in enumerate(self.trees):
            front = int(self.front[line])
            for node, token in enumerate(tree.tokens):
                parent, depth = tree.parents[node], tree.depths[node]
                ids[line, node + 1, front:] = ids[line, parent + 1, front:]
                ids[line, node + 1, front + depth - 1] = token
        return ids.flatten(0, 1)
