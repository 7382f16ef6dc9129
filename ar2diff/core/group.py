"""Rows that speculation reads together: a forward, what it says, and the next candidates.

This file is copied into converted folders: it imports torch and its neighbours alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .automaton import DEAD
from .candidates import CandidateReader
from .forward import context_length
from .pace import Pace
from .samplers import Context, likeliest, log_prob
from .sight import looking
from .transfer import download, downloading, upload
from .tree import Guesses, Reached, Tree


@dataclass(frozen=True)
class Found:
    """What a forward says of R rows with N candidates each.

    Attributes:
        tokens: [R, N + 1] the AR mode's, on the host.
        logits: [R * (N + 1), V] of possible tokens, from which they were drawn.
        ahead: [R, M, K, V] draft logits behind the candidates with masks. hidden: [R, M, K, H].
        logprob: [R * (N + 1)] of the tokens, if a device worked it out. guesses, worked: likewise.
        likeliest: [R * (N + 1), A] the likeliest tokens and their log-probabilities, if they are
            to be noted.
    """

    tokens: Tensor
    logits: Tensor | None = None
    ahead: Tensor | None = None
    hidden: Tensor | None = None
    logprob: Tensor | None = None
    guesses: Guesses | None = None
    worked: list[Tensor] = field(default_factory=list)
    likeliest: tuple[Tensor, Tensor] | None = None


class Group:
    """Rows that are read together, and what is known of them between two forwards.

    Args:
        own: the `Speculation` that they belong to.

    Attributes:
        rows: global numbers.
        front: tokens known of each, the newest not cached yet. newest: that token.
        trees: candidates for what follows, and the masks behind them.
        drafts: how many tokens are drafted behind each.
        zone: of `_zones`.
    """

    def __init__(self, own: Any, rows: list[int], zone: int):
        canvas = own.canvas
        self.own, self.rows, self.zone = own, rows, zone
        self.front = [canvas.front[row] for row in rows]
        read = canvas.read  # a prompt may end with an image
        self.newest = [int(read[row, canvas.front[row] - 1]) for row in rows]
        self.pace = own.pace if zone % 2 == 0 else Pace(0)
        self.trees = [Tree() for _ in rows]
        self.drafts = self.pace.planned
        self.pace.plan(self.trees, self.drafts)
        self.reader = CandidateReader(
            own.model, own.spec, len(rows), canvas.ids.shape[1], own.cache,
            context_length(own.model), self.pace.most, own.draft,
            own.chooser.options.compile, None if canvas.sight is None else canvas.sight.reach(rows),
        )  # fmt: skip

    def step(self) -> None:
        """Forward the rows once, accept candidates and draft anew."""
        canvas, drafts, start = self.own.canvas, self.drafts, time.perf_counter()
        alive = [not canvas.over[row] for row in self.rows]
        with looking(canvas.sight, self.rows):
            target, ahead, hidden = self.reader.read(
                canvas.read, self.rows, self.front, self.newest, self.trees, self.drafts
            )
        canvas.count([row for row, live in zip(self.rows, alive, strict=True) if live])
        tokens, logits = self._tokens(target)
        found = self._found(tokens, logits, ahead, hidden)
        own = found.tokens.tolist()
        ends = [
            tree.walk(line) if live and len(tree) else -1
            for tree, line, live in zip(self.trees, own, alive, strict=True)
        ]
        paths = [tree.path(end) for tree, end in zip(self.trees, ends, strict=True)]
        for row, tree, end in zip(self.rows, self.trees, ends, strict=True):
            canvas.refused[row] = tree.refused(end)
        self.reader.keep(paths, alive)
        judged = [line for line, live in enumerate(alive) if live]
        prompts = max(self.reader.certain) > 1
        if not prompts or any(map(len, self.trees)):  # behind a prompt nothing was drafted yet
            self.pace.saw([self.trees[n] for n in judged], [paths[n] for n in judged])
        self._write(paths, found, alive)
        self.newest = [line[end + 1] for line, end in zip(own, ends, strict=True)]
        self.front = [
            front + (len(path) + 1 if live else 0)
            for front, path, live in zip(self.front, paths, alive, strict=True)
        ]
        self._draft(ends, found, self.pace.planned if prompts else self.pace.drafts())
        if not prompts:
            self.pace.took(time.perf_counter() - start, self.reader.slots, drafts)

    def select(self, keep: list[int]) -> None:
        """Continue with some of the rows."""
        self.reader.select(keep)
        self.rows, self.front, self.newest, self.trees = (
            [values[line] for line in keep]
            for values in (self.rows, self.front, self.newest, self.trees)
        )

    def join(self, other: Group, first: int) -> None:
        """Take the rows of another group of this zone behind one's own; both have made a forward.

        Args:
            first: number of the first row of the other group's canvas on one's own.
        """
        self.reader.join(other.reader)
        self.rows = self.rows + [first + row for row in other.rows]
        self.front, self.newest = self.front + other.front, self._newest_with(other)
        self.trees = self.trees + other.trees
        self.pace.plan(self.trees, self.drafts)

    def follow(self, pace: Pace) -> None:
        """Draft at another pace from the next forward on."""
        if self.zone % 2 == 0:
            self.pace, self.drafts = pace, pace.planned
            pace.plan(self.trees, self.drafts)

    def settle(self) -> None:
        """Write the tokens of a forward that was launched and not read; here there is none."""

    def _newest_with(self, other: Group) -> list[int]:
        return self.newest + other.newest

    def _tokens(self, target: Tensor) -> tuple[Tensor, Tensor]:
        """The AR mode's tokens [R, N + 1] after the newest token and each candidate, and the logits
        [R * (N + 1), V] of possible tokens from which they were drawn."""
        canvas, (count, size) = self.own.canvas, target.shape[:2]
        rows = [row for row in self.rows for _ in range(size)]
        position = [
            front + depth
            for front, tree in zip(self.front, self.trees, strict=True)
            for depth in (0, *tree.depths, *[0] * (size - 1 - len(tree)))
        ]
        logits = self._possible(target.flatten(0, 1), self._held(rows, position))
        noise = self._noise(rows, position, logits.device)
        fitting = self._fitting(logits, rows, position, size)
        context = self._contexts(size, position)
        if context is None:
            return self._scores(fitting, noise, None).argmax(-1).view(count, size), logits
        # Of a row that is over there is no context, and nobody reads its tokens.
        (live,) = torch.tensor([not canvas.over[row] for row in rows]).nonzero(as_tuple=True)
        (at,) = upload(logits.device, live)
        noise = None if noise is None else noise[at]
        best = self._scores(fitting[at], noise, context.at(live)).max(-1)
        if self.own.chooser.options.guide is not None:
            self._forbid(live, best.values, size)
        tokens = torch.zeros(len(rows), dtype=torch.long, device=logits.device)
        return tokens.index_copy(0, at, best.indices).view(count, size), logits

    def _forbid(self, places: Tensor, scores: Tensor, size: int) -> None:
        """No walk goes to a candidate behind which the guide leaves no token: if the AR mode writes
        it all the same, the next forward says so.

        Args:
            places: of the R * size tokens. scores: the best of each.
        """
        (left,) = download(scores > float("-inf"))
        for place in places[~left].tolist():
            line, node = divmod(place, size)
            if 0 < node <= len(self.trees[line]):
                self.trees[line].tokens[node - 1] = -1

    def _found(
        self, tokens: Tensor, logits: Tensor, ahead: Tensor | None, hidden: Tensor | None
    ) -> Found:
        """What the host has to know of a forward.

        A device works out everything before it is asked, so that the host waits for it once: it
        drafts behind the end of each row's walk, which it finds for itself.
        """
        best, count = None, self.own.canvas.alternatives
        if count:
            best = tuple(download(*likeliest(logits, count)))
        if tokens.is_cpu:
            return Found(tokens, logits, ahead, hidden, likeliest=best)
        logprob, guesses, worked = log_prob(logits, tokens.flatten()), None, []
        if ahead is not None:
            chains, nodes, trust = self.pace.asks()
            guesses = replace(self._guesses_everywhere(tokens, ahead, hidden), trust=trust)
            worked = guesses.worked_out(chains, nodes)
        tokens, logprob, *worked = download(tokens, logprob, *worked)
        return Found(tokens, logprob=logprob, guesses=guesses, worked=worked, likeliest=best)

    def _possible(self, logits: Tensor, no_end: Tensor | None) -> Tensor:
        """Logits [N, V] with impossible tokens at -inf."""
        return self.own.chooser.possible(logits, no_end, self.own.canvas.end_ids)

    def _fitting(self, logits: Tensor, rows: list[int], position: list[int], size: int) -> Tensor:
        """Logits [R * (N + 1), V] without what does not fit the constraint after the newest token
        and each candidate."""
        constraint, states = self.own.canvas.constraint, []
        if constraint is None:
            return logits
        for line, tree in enumerate(self.trees):
            after = self._states_after(line, tree)
            states += [*after, *[DEAD] * (size - len(after))]
        return constraint.masked(logits, constraint.allowed(rows, position, states))

    def _states_after(self, line: int, tree: Tree) -> list[int]:
        """The constraint's states after a row's newest token and each candidate."""
        constraint, row = self.own.canvas.constraint, self.rows[line]
        states = [constraint.state(row, self.front[line])]
        for token, parent in zip(tree.tokens, tree.parents, strict=True):
            states.append(constraint.step(states[parent + 1], token))
        return states

    def _held(self, rows: list[int], position: list[int]) -> Tensor | None:
        """[N] bool, which positions may not hold an end token; None: all may."""
        canvas = self.own.canvas
        if not canvas.held:
            return None
        return torch.tensor(position) < canvas.end_from[torch.tensor(rows)]

    def _noise(self, rows: list[int], position: list[int], device: Any) -> Tensor | None:
        """[N, V] the noise of positions; None: sampling is greedy."""
        noise = self.own.noise
        return None if noise is None else noise.at(rows, position, device)

    def _scores(self, logits: Tensor, noise: Tensor | None, context: Context | None) -> Tensor:
        """Scores [N, V] after temperature, filters and penalties, with the noise of their
        positions: the highest one is drawn."""
        scores = self.own.chooser.warp(logits, context)
        return scores if noise is None else scores + noise

    def _write(self, paths: list[list[int]], found: Found, alive: list[bool]) -> None:
        """Write each row's accepted candidates, and the token after them."""
        canvas, size, tokens = self.own.canvas, found.tokens.shape[1], found.tokens.flatten()
        rows, chosen, positions = [], [], []
        for line, (row, front, path) in enumerate(zip(self.rows, self.front, paths, strict=True)):
            room = canvas.last[row] - front if alive[line] else 0
            taken = [line * size, *(line * size + node + 1 for node in path)][:room]
            rows += [row] * len(taken)
            chosen += taken
            positions += range(front, front + len(taken))
        at = torch.tensor(chosen) if len(chosen) < len(tokens) else slice(None)
        tokens = tokens[at]
        logprob = log_prob(found.logits[at], tokens) if found.logprob is None else found.logprob[at]
        rows, positions = torch.tensor(rows), torch.tensor(positions)
        if found.likeliest is not None:
            canvas.note(rows, positions, [x[at] for x in found.likeliest])
        self._put(rows, positions, tokens, logprob)

    def _put(self, rows: Tensor, positions: Tensor, tokens: Tensor, logprob: Tensor) -> None:
        """Write tokens [N], and drop the noise of what is decided."""
        canvas, noise = self.own.canvas, self.own.noise
        canvas.write(rows, positions, tokens, logprob, self.own.finished)
        if noise is not None:
            for row in self.rows:
                noise.forget(row, canvas.front[row])

    def _draft(self, ends: list[int], found: Found, after: int) -> None:
        """New candidates for what follows the newest token of each row.

        Args:
            ends: the node at which each row's walk ended.
            after: how many tokens the next forward drafts.
        """
        drafts, self.drafts = self.drafts, after
        if not drafts and not self.drafts and not any(map(len, self.trees)):
            return
        blocks = [
            tree.blocks.index(end) if drafts and end in tree.blocks else -1
            for tree, end in zip(self.trees, ends, strict=True)
        ]
        self.trees = [Tree() for _ in blocks]
        have = [line for line, block in enumerate(blocks) if block >= 0]
        if have:
            if found.guesses is not None:
                guesses = found.guesses.on_host(found.worked, have)
            else:
                guesses = self._guesses_of(have, [blocks[line] for line in have], found)
            for line, tree in zip(have, self.pace.grown(guesses), strict=True):
                self.trees[line] = tree
        self.cut()
        self.pace.plan(self.trees, self.drafts)

    def cut(self) -> None:
        """Drop the candidates that the constraint does not allow."""
        if self.own.canvas.constraint is None:
            return
        for line, tree in enumerate(self.trees):
            tree.keep([state != DEAD for state in self._states_after(line, tree)[1:]])

    def _guesses_of(self, lines: list[int], blocks: list[int], found: Found) -> Guesses:
        """Guesses of some of the rows, from their drafts behind one of the candidates each."""
        at, drafts = (torch.tensor(lines), torch.tensor(blocks)), found.ahead.shape[2]
        rows = [self.rows[line] for line in lines for _ in range(drafts)]
        position = [self.front[line] + ahead for line in lines for ahead in range(drafts)]
        newest = torch.tensor([self.newest[line] for line in lines])
        noise = self._noise(rows, position, newest.device)
        hidden = None if found.hidden is None else found.hidden[at]
        ahead, constraint = found.ahead[at], self.own.canvas.constraint
        if constraint is not None:
            reach = [constraint.reachable(self.rows[n], self.front[n], drafts) for n in lines]
            ahead = constraint.masked(ahead.flatten(0, 1), torch.cat(reach)).view_as(ahead)
        return self._guesses(ahead, hidden, newest, self._held(rows, position), noise)

    def _guesses_everywhere(self, tokens: Tensor, ahead: Tensor, hidden: Tensor | None) -> Guesses:
        """Guesses of all rows on a device, whose host does not know where the walks end.

        Args:
            tokens: [R, N + 1] of the AR mode.
        """
        device, drafts, canvas = tokens.device, ahead.shape[2], self.own.canvas
        reached, row = Reached.of(self.trees, tokens), torch.arange(len(tokens), device=device)
        place = 1 + reached.depth[:, None] + torch.arange(drafts, device=device)  # less the front
        no_end = noise = None
        if canvas.held:
            at = torch.tensor(self.rows)
            (left,) = upload(device, canvas.end_from[at] - torch.tensor(self.front))
            no_end = (place < left[:, None]).flatten()
        if self.own.noise is not None:
            size = 1 + drafts + max((max(t.depths) for t in self.trees if len(t)), default=0)
            rows = [r for r in self.rows for _ in range(size)]
            position = [front + ahead for front in self.front for ahead in range(size)]
            held = self._noise(rows, position, device).unflatten(0, (len(tokens), size))
            noise = held[row[:, None], place].flatten(0, 1)
        at = row, reached.block
        hidden = None if hidden is None else hidden[at]
        return self._guesses(ahead[at], hidden, reached.newest, no_end, noise)

    def _guesses(
        self,
        logits: Tensor,
        hidden: Tensor | None,
        newest: Tensor,
        no_end: Tensor | None,
        noise: Tensor | None,
    ) -> Guesses:
        """Guesses from draft logits [R', K, V], hidden states [R', K, H] and the token [R'] before
        them; which of them may hold no end token, [R' * K]; and their noise [R' * K, V]."""
        count, drafts = logits.shape[:2]
        logits = self._possible(logits.flatten(0, 1), no_end)
        scores = self._scores(logits, noise, None).view(count, drafts, -1)
        head = None if hidden is None else self.own.draft.head
        gates = None if hidden is None else head.gates(hidden)
        temperature = self.own.chooser.options.temperature or 1.0
        return Guesses(scores, newest, head, gates, temperature)

    def _contexts(self, size: int, position: list[int]) -> Context | None:
        """What stands before the token after the newest token and each candidate, candidates
        included; the mask elsewhere.

        Args:
            position: of each of these R * size tokens.
        """
        canvas = self.own.canvas
        if not self.own.chooser.readers:
            return None
        deepest = max((max(tree.depths) for tree in self.trees if len(tree)), default=0)
        width = canvas.ids.shape[1] + deepest
        ids = torch.full((len(self.rows), size, width), canvas.mask_token_id)
        for line, (row, front, tree) in enumerate(
            zip(self.rows, self.front, self.trees, strict=True)
        ):
            if canvas.over[row]:  # its last candidates may lie beyond the canvas
                continue
            ids[line, :, :front] = canvas.ids[row, :front]
            for node, (token, parent) in enumerate(zip(tree.tokens, tree.parents, strict=True)):
                ids[line, node + 1, front:] = ids[line, parent + 1, front:]
                ids[line, node + 1, front + tree.depths[node] - 1] = token
        tentative = (torch.arange(size) > 0).repeat(len(self.rows))
        return Context(ids.flatten(0, 1), torch.tensor(position), tentative)


@dataclass(frozen=True)
class Launched:
    """A forward whose tokens the host has not read: its rows, the position of each one's token (-1:
    of none), and a function that waits for the tokens [R, 1] and their log-probabilities [R]."""

    rows: list[int]
    position: list[int]
    wait: Callable[[], list[Tensor]]


class LateGroup(Group):
    """Rows without drafts on a device, which computes a forward while the host reads the tokens of
    the one before: they stay there as the input of the next one. The host learns one forward late
    that a row is over, and drops what that forward made of it."""

    def __init__(self, own: Any, rows: list[int], zone: int):
        super().__init__(own, rows, zone)
        self.launched: Launched | None = None

    def step(self) -> None:
        """Launch a forward, if one is left, and write the tokens of the last one."""
        last, self.launched = self.launched, self._launch()
        if last is not None:
            self._settle(last)

    def select(self, keep: list[int]) -> None:
        """Continue with some of the rows."""
        (lines,) = upload(self.newest.device, torch.tensor(keep))
        newest, self.newest = self.newest[lines], [0] * len(self.rows)
        super().select(keep)
        self.newest = newest

    def settle(self) -> None:
        """Write the tokens of the forward that was launched last."""
        last, self.launched = self.launched, None
        if last is not None:
            self._settle(last)

    def _newest_with(self, other: LateGroup) -> Tensor:
        return torch.cat([self.newest, other.newest])

    def _launch(self) -> Launched | None:
        canvas = self.own.canvas
        alive = [
            not canvas.over[row] and front < canvas.last[row]
            for row, front in zip(self.rows, self.front, strict=True)
        ]
        if not any(alive):
            return None
        with looking(canvas.sight, self.rows):
            target, _, _ = self.reader.read(
                canvas.read, self.rows, self.front, self.newest, self.trees, 0
            )
        tokens, logits = self._tokens(target)
        wait = downloading(tokens, log_prob(logits, tokens.flatten()))
        self.reader.keep([[] for _ in self.rows], alive)
        there = [front if live else -1 for front, live in zip(self.front, alive, strict=True)]
        self.newest = tokens[:, 0]
        self.front = [front + live for front, live in zip(self.front, alive, strict=True)]
        return Launched(self.rows, there, wait)

    def _settle(self, launched: Launched) -> None:
        """Write the tokens of rows that were not over before them."""
        canvas, (tokens, logprob) = self.own.canvas, launched.wait()
        known = [
            (line, row, position)
            for line, (row, position) in enumerate(
                zip(launched.rows, launched.position, strict=True)
            )
            if position >= 0 and not canvas.over[row]
        ]
        if not known:
            return
        lines, rows, positions = torch.tensor(known).unbind(1)
        canvas.count(rows.tolist())
        self._put(rows, positions, tokens[lines, 0], logprob[lines])
