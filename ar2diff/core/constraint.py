"""Which tokens a constraint lets a sampler write, so that the answer can always be completed.

In mode diffusion each forward takes *one* path of the automaton through all undecided positions of
a block, the likeliest or a drawn one, under the product of the positions' distributions. Of its
tokens any subset may be decided: the rest of the path shows how the text can be completed. (To mask
each position by itself would not do: two tokens that each fit some answer need not fit one.) In
modes `ar` and `speculative` the distribution of the next token is masked and renormalised.
This file is copied into converted folders: it imports numpy, torch and its neighbours alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .automaton import DEAD, Array, Automaton
from .canvas import Canvas
from .errors import Ar2DiffError, option
from .lattice import NEVER, Lattice, layers_of, log_sum
from .samplers import HIDDEN, Choice, Chooser, Context, draw, log_prob
from .transfer import download, upload

LOWEST = -1e30  # the logit of a token that a filter has taken away, where it is needed


@dataclass(frozen=True)
class Span:
    """Positions of a row whose text has to match as a whole.

    Attributes:
        begin, end: first position, and the one after the last.
        held: so many of the first tokens may not end the text; for a gap, all of them.
        start: the state of the automaton before the first.
    """

    begin: int
    end: int
    held: int
    start: int

    @property
    def room(self) -> int:
        """Tokens that it has."""
        return self.end - self.begin


class Constraint:
    """An automaton, and where on a canvas it reads.

    Args:
        spans: of each row, from left to right and not adjacent; None: the gaps of its prompt, each
            by itself; for a row without gaps, its answer.
        spaced: for each row, which of its gaps begin with a space that belongs to the prompt: they
            begin in the automaton's second start. None: no gap does.

    Raises:
        Ar2DiffError: no allowed text fits the room.
    """

    def __init__(
        self,
        automaton: Automaton,
        canvas: Canvas,
        spans: Sequence[Sequence[Span]] | None = None,
        spaced: Sequence[Sequence[bool]] | None = None,
    ):
        self.automaton, self.canvas = automaton, canvas
        self.token_class = automaton.token_class
        if spans is None:
            first, rows = automaton.starts[0], range(len(canvas.ids))
            starts = [[automaton.starts[s] for s in row] or [first] for row in spaced or ()]
            every = [first] * canvas.ids.shape[1]
            spans = [_spans(canvas, row, starts[row] if starts else every) for row in rows]
        self.spans = spans
        if not automaton.can_end:
            self.spans = [[replace(span, held=span.room) for span in row] for row in self.spans]
        shapes = {(span.room, span.held) for row in self.spans for span in row}
        self.left = {shape: automaton.completable(*shape) for shape in shapes}
        for span in (span for row in self.spans for span in row):
            if not self.left[span.room, span.held][span.room][span.start]:
                raise _no_room(automaton, span)
        self.places = _places(self.spans)
        self.laid: tuple[tuple[int, ...], Lattice] | None = None
        self.known: dict[Span, dict[int, tuple[int, int]]] = {}  # by row: (position, state)

    def joins(self, other: Any) -> bool:
        """Whether rows of the other one can be read beside these."""
        return isinstance(other, Constraint) and other.automaton is self.automaton

    def joined(self, other: Constraint, canvas: Canvas) -> Constraint:
        """The constraint of the rows of both, on a canvas that holds them."""
        return self._on(canvas, [*self.spans, *other.spans], self.left | other.left)

    def selected(self, rows: Sequence[int], canvas: Canvas) -> Constraint:
        """The constraint of some of the rows, on a canvas that holds them."""
        return self._on(canvas, [self.spans[row] for row in rows], self.left)

    def _on(
        self,
        canvas: Canvas,
        spans: Sequence[Sequence[Span]],
        left: dict[tuple[int, int], list[Array]],
    ) -> Constraint:
        shapes = {(span.room, span.held) for row in spans for span in row}
        own = copy(self)
        own.canvas, own.spans, own.places = canvas, spans, _places(spans)
        own.left = {shape: left[shape] for shape in shapes}
        own.laid, own.known = None, {}
        return own

    # mode diffusion

    def choose(
        self,
        chooser: Chooser,
        row: Tensor,
        position: Tensor,
        masked: Tensor,
        logits: Tensor,
        context: Context | None,
        u: Tensor | None,
    ) -> tuple[Choice, Choice]:
        """Tokens for the undecided positions of blocks, those of one path for each row; and the
        same tokens with how sure the model is of each *among those that can stand there*, which is
        what decides between them. Both are on the CPU.

        (The probability of a token given that the whole text matches would be another measure. It
        counts the product of the positions' distributions as if they were independent, and is too
        sure of where a form continues: texts get worse.)

        Args:
            row, position: [R, W] of the tokens of the blocks. masked: [R, W] bool, N undecided.
            logits: [N, V] of `Chooser.possible`.
            context: as of `Chooser.warp`.
            u: [N] numbers in [0, 1) that decide the draws; None: the likeliest path is taken.
        """
        best, undecided, possible = u is None, masked.numpy(), None
        lattice = self._lattice(row, position, undecided)
        if chooser.options.filters:  # which choose among what can stand there
            even = lattice.filled(undecided, 0.0)
            possible = self._possible(logits, even, even.behind(True), undecided)
        scores = chooser.warp(logits if possible is None else possible, context)
        drawn = self._drawn(scores, best)
        lattice = lattice.filled(undecided, drawn)
        behind = lattice.behind(best)
        lost = (lattice.total(behind) == NEVER) & undecided.any(1)
        if lost.any():  # no path is left of what filters leave, but one of what they take
            again = lost[undecided.nonzero()[0]]
            drawn = np.where(again[:, None], self._drawn(logits, best).clip(LOWEST), drawn)
            lattice = lattice.filled(undecided, drawn)
            behind = lattice.behind(best)
            (again,) = upload(logits.device, torch.from_numpy(again))
            scores = torch.where(again[:, None], logits.clamp(min=LOWEST), scores)
        if possible is None:
            possible = self._possible(logits, lattice, behind, undecided)
        numbers = None if best else _spread(u.numpy(), undecided)
        labels, rest = lattice.paths(behind, numbers)
        label, rest = upload(
            logits.device, torch.from_numpy(labels[undecided]), torch.from_numpy(rest[undecided])
        )
        other = (self._index(logits.device) != label[:, None]) & (label >= 0)[:, None]
        scores = scores.masked_fill(other, HIDDEN)
        tokens = scores.argmax(-1) if best else draw(scores.softmax(-1), rest)
        sure = chooser.measured(possible, tokens)
        known = {name: value for name, value in vars(sure).items() if value is not None}
        own, *values = download(log_prob(logits, tokens), *known.values())
        sure = Choice(**dict(zip(known, values, strict=True)))
        return Choice(sure.tokens, own), sure

    def _possible(
        self, logits: Tensor, lattice: Lattice, behind: list[Array], undecided: Array
    ) -> Tensor:
        """Logits [N, V] without the tokens that are on no path."""
        return self.masked(logits, torch.from_numpy(lattice.possible(behind)[undecided]))

    def _drawn(self, scores: Tensor, best: bool) -> Array:
        """[N, C] what the scores of each class weigh in a path."""
        (table,) = download(self._table(scores, best))
        return table.double().numpy()

    def _table(self, scores: Tensor, best: bool) -> Tensor:
        """[N, C] of scores [N, V]: the largest of each class, or the logarithm of the sum of
        exponentials; on the device of the scores, so that only the classes travel."""
        if scores.is_cpu and not best:
            return self._sums_on_host(scores.numpy())
        index = self._index(scores.device).expand_as(scores)
        top = scores.new_full((len(scores), self.automaton.classes), HIDDEN)
        top.scatter_reduce_(1, index, scores, "amax")
        if best:
            return top
        shift = top.masked_fill(top == HIDDEN, 0.0)
        total = torch.zeros_like(top)
        total.scatter_add_(1, index, (scores - shift.gather(1, index)).exp())
        return total.log() + shift

    def _sums_on_host(self, scores: Array) -> Tensor:
        """The sums on the CPU, where sorting the tokens is faster than scattering them."""
        order, labels, first, place = self.automaton.by_class
        found = np.full((len(scores), self.automaton.classes), NEVER, scores.dtype)
        found[:, labels] = log_sum(scores.take(order, 1), first, place)
        return torch.from_numpy(found)

    def _index(self, device: Any) -> Tensor:
        """[V] the class of each token, on a device."""
        if self.token_class.device != device:
            self.token_class = self.automaton.token_class.to(device)
        return self.token_class

    def _lattice(self, row: Tensor, position: Tensor, undecided: Array) -> Lattice:
        """Where spans lie in blocks, and what is decided there."""
        key = (*row[:, 0].tolist(), *position[:, 0].tolist(), position.shape[1])
        if self.laid is None or self.laid[0] != key:  # else these blocks have been read before
            self.laid = key, self._laid_out(row[:, 0].tolist(), position.numpy())
        lattice = self.laid[1]
        decided = lattice.inside & ~undecided
        tokens = self.canvas.ids[row, position.clamp(max=self.canvas.ids.shape[1] - 1)].numpy()
        weights = np.full((*decided.shape, self.automaton.classes), NEVER)
        weights[decided, self.automaton.token_class.numpy()[tokens[decided]]] = 0.0
        return replace(lattice, weights=weights)

    def _laid_out(self, numbers: list[int], place: Array) -> Lattice:
        """A lattice without weights, of blocks at positions [R, W] of rows."""
        own = self.automaton
        inside, closes, held = (np.zeros(place.shape, bool) for _ in range(3))
        begin, resume = np.zeros(len(place), int), np.zeros(place.shape, int)
        limit = np.ones((len(place), own.states), bool)
        behind = place[:, -1] + 1
        for spans in reversed(self.places[numbers].transpose(1, 2, 0)):  # from right to left
            begins, ends, holds, starts = spans[:, :, None]
            resume = np.where(place < begins, starts, resume)
            begin = np.where(place[:, 0] <= spans[0], spans[3], begin)
            here = (begins <= place) & (place < ends)
            inside |= here
            closes |= here & (place == ends - 1)
            held |= here & (place < begins + holds)
        for line, number in enumerate(numbers):
            for span in self.spans[number]:
                if span.begin < place[line, 0] < span.end:
                    begin[line] = self._state(number, span, int(place[line, 0]))
                if span.begin < behind[line] < span.end:
                    limit[line] = self.left[span.room, span.held][span.end - behind[line]]
        layers = layers_of(own, inside, closes, begin, resume)
        return Lattice(own, inside, closes, held, begin, resume, limit, limit, layers)

    def _state(self, row: int, span: Span, position: int) -> int:
        """The state before a position of a span, all of which is decided up to there."""
        known = self.known.setdefault(span, {})
        at, state = known.get(row, (span.begin, span.start))
        if at > position:  # remasking has taken back what was read
            at, state = span.begin, span.start
        state = self.automaton.walk(self.canvas.ids[row, at:position].tolist(), state)
        known[row] = position, state
        return state

    # modes ar and speculative

    def state(self, row: int, front: int) -> int:
        """The state after the first tokens of a row, as many as `front`."""
        (span,) = self.spans[row]
        return self._state(row, span, min(front, span.end))

    def step(self, state: int, token: int) -> int:
        """The state after one more token; `DEAD` if it does not fit."""
        return self.automaton.step(state, token)

    def allowed(
        self, rows: Sequence[int], positions: Sequence[int], states: Sequence[int]
    ) -> Tensor:
        """[N, C] bool, the classes of the tokens that may stand at positions.

        Args:
            states: of the automaton before each; `DEAD` for one that nobody asks about.
        """
        own = self.automaton
        found = np.ones((len(rows), own.classes), bool)
        for place, (row, position, state) in enumerate(zip(rows, positions, states, strict=True)):
            (span,) = self.spans[row]
            if state == DEAD or position >= span.end:
                continue
            edges = slice(own.first[state], own.first[state + 1])
            left = self.left[span.room, span.held][span.end - position - 1]
            fits = left[own.target[edges]]
            if position - span.begin < span.held:
                fits = fits & (own.label[edges] != own.ends)
            found[place] = False
            found[place, own.label[edges][fits]] = True
        return torch.from_numpy(found)

    def reachable(self, row: int, front: int, count: int) -> Tensor:
        """[count, C] bool, the classes that the next tokens of a row can have, whatever stands
        between them and the first `front` tokens."""
        (span,), own = self.spans[row], self.automaton
        left = self.left[span.room, span.held]
        found = np.ones((count, own.classes), bool)
        states = np.array([self.state(row, front)])
        for place, position in enumerate(range(front, min(front + count, span.end))):
            edges = own.fan[states].ravel()
            edges = edges[edges >= 0]
            edges = edges[left[span.end - position - 1][own.target[edges]]]
            if position - span.begin < span.held:
                edges = edges[own.label[edges] != own.ends]
            found[place] = False
            found[place, own.label[edges]] = True
            states = np.unique(own.target[edges])
        return torch.from_numpy(found)

    def masked(self, logits: Tensor, allowed: Tensor) -> Tensor:
        """Logits [N, V] without the tokens that are not allowed [N, C]."""
        (fits,) = upload(logits.device, allowed)
        return logits.masked_fill(~self.tokens(fits), HIDDEN)

    def tokens(self, allowed: Tensor) -> Tensor:
        """[N, V] bool, the tokens of the classes [N, C]."""
        return allowed[:, self._index(allowed.device)]

    def whole(self, row: int, end: int) -> bool:
        """Whether what stands in a row up to a position is all that has to match, and does."""
        return all(
            end >= span.begin
            and self.automaton.accepting[self._state(row, span, min(span.end, end))]
            for span in self.spans[row]
        )


def _places(spans: Sequence[Sequence[Span]]) -> Array:
    """[R, K, 4] of spans, and empty ones."""
    most, none = max(map(len, spans)), Span(0, 0, 0, 0)
    return np.array(
        [
            [(s.begin, s.end, s.held, s.start) for s in (*row, *[none] * (most - len(row)))]
            for row in spans
        ]
    )


def _spread(values: Array, where: Array) -> Array:
    """[N] values in their places [R, W], zero elsewhere."""
    found = np.zeros(where.shape)
    found[where] = values
    return found


def _spans(canvas: Canvas, row: int, starts: Sequence[int]) -> list[Span]:
    """The gaps of a row's prompt, or its answer.

    Args:
        starts: of the gaps, or of the answer.
    """
    prompt = int(canvas.prompt[row])
    gaps = set((~canvas.given[row, :prompt]).nonzero()[:, 0].tolist())
    if not gaps:
        return [Span(prompt, canvas.last[row], canvas.first[row] - prompt, starts[0])]
    begins = sorted(place for place in gaps if place - 1 not in gaps)
    ends = sorted(place + 1 for place in gaps if place + 1 not in gaps)
    return [Span(b, e, e - b, start) for b, e, start in zip(begins, ends, starts, strict=False)]


def _no_room(automaton: Automaton, span: Span) -> Ar2DiffError:
    """The error for a span that has not the length of any text that matches."""
    shortest, room, most = automaton.shortest(span.start), span.room, option("max_new_tokens")
    gap = span.held == room  # which is filled to its end
    if shortest > room:
        what = f"the shortest text that matches has {shortest} tokens, but there is room for {room}"
        fix = "make the gap longer" if gap else f"set {most} to {shortest} or more"
    elif gap:
        what = f"no text that matches has exactly {room} tokens, as many as are to be filled"
        fix = f"change the length of the gap; the shortest text has {shortest} tokens"
    else:
        what = f"no text that matches has from {span.held} to {room} tokens"
        fix = f"lower {option('min_new_tokens')}, or raise {most}"
    return Ar2DiffError(what, fix)
