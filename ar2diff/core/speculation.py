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

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .canvas import Canvas, Finished
from .decoder import Decoder
from .draft import Draft
from .forward import rope_regime, rope_switches, without_gradients
from .group import Group, LateGroup
from .gumbel import GumbelNoise
from .options import Options
from .pace import Cost, LeanPace, MeasuredPace, Pace, Timing, slots_of
from .samplers import Chooser
from .spec import Spec

PACES: WeakKeyDictionary[Any, dict[tuple[bool, int, int], MeasuredPace]] = WeakKeyDictionary()
TIMED = 16  # tokens of a prompt that are continued to time the forwards
BRANCHES = 15  # candidates of a tree that is timed
ENOUGH = 0.3  # seconds of forwards that are timed, and
MOST_TIMED = 12  # forwards of each kind
WAITING = ("cpu",)  # devices on which the host does nothing else while they compute


class Speculation(Decoder):
    """Decodes rows from left to right.

    Args:
        canvas: prompts without masks.
        paced: says for a canvas how many candidates and masks a forward holds; asked again when it
            has other rows.
        draft: the draft adapter, if the model has one.
        cache: `dynamic`, `static` or `none`.
    """

    def __init__(
        self,
        model: Any,
        spec: Spec,
        canvas: Canvas,
        chooser: Chooser,
        paced: Callable[[Canvas], Pace],
        *,
        draft: Draft | None = None,
        cache: str = "dynamic",
        finished: Finished | None = None,
    ):
        self.model, self.spec, self.canvas, self.chooser = model, spec, canvas, chooser
        self.paced, self.draft, self.cache, self.finished = paced, draft, cache, finished
        self.pace = paced(canvas)
        self.switches = rope_switches(model.config)
        vocabulary = model.config.get_text_config().vocab_size
        self.without_gradients = without_gradients(model, chooser.options.compile)
        greedy = chooser.options.greedy
        self.noise = None if greedy else GumbelNoise(chooser.generators, vocabulary)
        self.groups: list[Group] | None = None

    def close(self) -> None:
        """See `Decoder`."""
        self.groups = []

    @torch.no_grad()
    def step(self) -> None:
        """Forward all rows once, and write what is accepted."""
        if self.groups is None:
            self.groups = self._found([*range(len(self.canvas.front))])
        else:
            self.groups = self._regrouped(self.groups)
        for group in self.groups:
            with self.without_gradients():
                group.step()

    @property
    def joins(self) -> bool:
        """Whether rows can join: the cache of those that are there grows."""
        return self.cache != "static"

    @property
    def resumes(self) -> bool:
        """Whether a row can begin with a context that was read before: its keys depend on the
        context alone."""
        return self.cache == "dynamic" and not self.switches

    def resume(self, contexts: Sequence[list[tuple[Tensor, Tensor]]]) -> None:
        """Begin with keys and values, by layer, of the first tokens of each row: of none, or of
        some, but not of all that are known; and of none in not every row."""
        (group,) = self.groups = self._found([*range(len(contexts))])
        group.reader.resume(contexts)

    def context(self, row: int) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of what has been read of a row for good, by layer; none of a row that is
        not read any more."""
        for group in self.groups:
            if row in group.rows:
                return group.reader.cache.context(group.rows.index(row))
        return []

    def join(self, other: Speculation) -> None:
        """Take the rows of another decoder with the same options behind one's own; both have made
        a forward."""
        for group in (*self.groups, *other.groups):
            group.settle()
        first = self._extend(other)
        if self.noise is not None:
            self.noise.join(other.noise)
        for group in other.groups:
            zone = [own for own in self.groups if own.zone == group.zone]
            if zone:
                zone[0].join(group, first)
            else:
                group.own, group.rows = self, [first + row for row in group.rows]
                self.groups.append(group)
        self._repace()

    def expect(self, other: Speculation) -> None:
        """Draft behind the prompts, before the first forward, as the decoder does that will take
        these rows: while it rests, nothing."""
        self.pace = other.pace

    def select(self, rows: Sequence[int]) -> None:
        """Continue with some of the canvas's rows, which are not finished."""
        number = {row: place for place, row in enumerate(rows)}
        kept = []
        for group in self.groups:
            group.settle()
            lines = [line for line, row in enumerate(group.rows) if row in number]
            if not lines:
                continue
            if len(lines) < len(group.rows):
                group.select(lines)
            group.rows = [number[row] for row in group.rows]
            kept.append(group)
        self.groups = kept
        self._reduce(rows)
        if self.noise is not None:
            self.noise.select(rows)
        self._repace()

    def _repace(self) -> None:
        """Draft as many tokens as pay for so many rows."""
        pace = self.paced(self.canvas)
        if pace is not self.pace:
            self.pace = pace
            for group in self.groups:
                group.follow(pace)

    def _found(self, rows: list[int]) -> list[Group]:
        """New groups of rows, one for each zone."""
        zones: dict[int, list[int]] = {}
        for row, zone in zip(rows, self._zones(rows), strict=True):
            zones.setdefault(zone, []).append(row)
        kind = LateGroup if self._reads_late() else Group
        return [kind(self, found, zone) for zone, found in sorted(zones.items())]

    def _reads_late(self) -> bool:
        """Whether a forward is launched before the host reads the tokens of the last one: without
        drafts, the next forward needs nothing of them but themselves."""
        return (
            self.model.device.type not in WAITING
            and not self.pace.most
            and not self.chooser.readers
            and self.canvas.constraint is None
            and not self.canvas.alternatives
            and self.cache != "none"
            and not self.switches
        )

    def _regrouped(self, groups: list[Group]) -> list[Group]:
        """Groups without the rows that have finished, once their slots are half as many
        as there are rows, and with rows that have come to another zone in groups of their own."""
        kept: list[Group] = []
        for group in groups:
            alive = [not self.canvas.over[row] for row in group.rows]
            if not self.switches and all(alive):
                kept.append(group)
                continue
            stay = [zone == group.zone for zone in self._zones(group.rows)]
            lines = list(zip(group.rows, alive, stay, strict=True))
            kept += self._found([row for row, live, here in lines if live and not here])
            left = [n for n, (_, live, here) in enumerate(lines) if live and here]
            if not left:
                continue
            # Their slots cost more the more there are; that of a cache that moves is one read.
            over = 2 * (len(group.rows) - len(left)) * group.reader.slots
            few = self.cache != "static" and over >= len(group.rows)
            if few or not all(stay):
                group.select(left)
            kept.append(group)
        return kept

    def _zones(self, rows: list[int]) -> list[int]:
        """Which rows can be read together, where the model's rotary factors change with the length
        of the longest row: twice the regime of `rope_regime`, plus one if drafts would reach beyond
        its end. Such rows decode without drafts, as their AR mode would, until they have passed
        it."""
        if not self.switches:
            return [0] * len(rows)
        front = torch.tensor([self.canvas.front[row] for row in rows])
        now = rope_regime(front, self.switches)
        reach = self.pace.reach  # of the block after the last draft
        return (2 * now + (rope_regime(front + reach, self.switches) != now)).tolist()


def measured_pace(
    model: Any, spec: Spec, canvas: Canvas, suppressed: Tensor, draft: Draft | None
) -> MeasuredPace:
    """The pace for a model and batches of a size: the forwards are timed the first time, when a few
    tokens are written without drafts, with few and with many; what is learned while decoding is
    kept for the next batch.

    Args:
        canvas: the batch. suppressed: ids that no position can hold.
    """
    rows, longest = len(canvas.front), spec.block_length - 1
    known = PACES.setdefault(model, {})
    key = draft is not None, longest, (rows - 1).bit_length()  # of batches up to twice as large
    if key not in known:
        prompt = canvas.ids[0, : canvas.front[0]].tolist()[-TIMED:]
        small, large = min(2, longest), min(5, longest)
        chooser = Chooser(Options(), suppressed, [])
        paces = Pace(0), Pace(small), Pace(large), LeanPace(large), Pace(large, BRANCHES)
        plain, few, many, lean, tree = _seconds(
            [
                Speculation(model, spec, _blank(spec, prompt, rows), chooser, pace.of, draft=draft)
                for pace in paces
            ]
        )
        cost = Cost.through(
            plain,
            Timing(1 + slots_of(small, small), small, few),
            Timing(1 + slots_of(large, large), large, many),
            Timing(1 + large, large, lean),
        )
        more = max(0.0, tree - cost.of(1 + slots_of(BRANCHES, large), large))
        known[key] = MeasuredPace(replace(cost, tree=more), longest)
    return known[key]


def _blank(spec: Spec, prompt: list[int], rows: int) -> Canvas:
    return Canvas.of_prompts([prompt] * rows, spec.mask_token_id, max_new_tokens=1 << 10)


def _seconds(runs: list[Speculation]) -> list[float]:
    """Of the fastest forward of each, after two; fewer forwards if they are slow."""
    states, found = [run.run() for run in runs], [[] for _ in runs]
    while len(found[0]) < 3 or (len(found[0]) < MOST_TIMED and sum(map(sum, found)) < ENOUGH):
        for state, times in zip(states, found, strict=True):
            start = time.perf_counter()
            next(state)
            times.append(time.perf_counter() - start)
    return [min(times[2:]) for times in found]
