"""A finite automaton that reads tokens: which answers a constraint allows.

Its edges carry classes of tokens rather than tokens: two tokens that lead from every state to the
same state are one class, so that a vocabulary of 150,000 comes down to a few hundred. What ends an
answer is part of it: an end token leads from an accepting state to the state END, where anything
may follow, since nobody reads on.
This file is copied into converted folders: it imports numpy, torch and its neighbours alone.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray
DEAD = -1  # not a state: what was read cannot become an allowed answer


@dataclass(frozen=True)
class Automaton:
    """States 0 to S - 1, the last of them END; classes of tokens 0 to C - 1.

    The last two classes hold the end tokens, and all tokens that occur in no allowed text.

    Attributes:
        token_class: [V] int, the class of each token.
        source, label, target: [E] the state, class and next state of each edge, sorted by state
            and class. Every state has an edge, and from every state an answer can be completed.
        accepting: [S] bool, states in which an answer may end for lack of room, END among them.
        starts: states before a first token, of one text or of several kinds of them.
        classes: C. reckoned: what `completable` has found last.
    """

    token_class: Tensor
    source: Array
    label: Array
    target: Array
    accepting: Array
    starts: tuple[int, ...]
    classes: int
    reckoned: dict[tuple[int, int], list[Array]] = field(default_factory=dict, repr=False)

    @classmethod
    def of_edges(
        cls,
        edges: tuple[Array, Array, Array],
        starts: Sequence[int],
        accepting: Collection[int],
        vocabulary: int,
        *,
        end_ids: Collection[int] = (),
        impossible: Collection[int] = (),
    ) -> Automaton | None:
        """The automaton of an index over tokens; None if it allows nothing from one of its starts.

        Args:
            edges: [E] states, [E] tokens and [E] next states, where tokens are those of the text.
            accepting: states in which a text is complete.
            vocabulary: number of tokens, V.
            end_ids: tokens that end an answer. An edge that has one is dropped, since such a token
                is never part of the text.
            impossible: tokens that the sampler never writes, as end tokens or otherwise.
        """
        barred = np.zeros(vocabulary, bool)
        barred[[*end_ids, *impossible]] = True
        source, token, target = edges
        known = (token >= 0) & (token < vocabulary)
        source, token, target = (values[known] for values in edges)
        source, token, target = (values[~barred[token]] for values in (source, token, target))
        states = _useful(source, target, starts, accepting)
        if not states.issuperset(starts):
            return None
        number = np.full(int(max(states, default=0)) + 1, DEAD)
        number[sorted(states)] = np.arange(len(states))
        inside = np.isin(source, list(states)) & np.isin(target, list(states))
        source, token, target = number[source[inside]], token[inside], number[target[inside]]
        token_class, count = _classes(source, token, target, vocabulary)
        ends, end = count, len(states)
        token_class[[token for token in end_ids if token not in set(impossible)]] = ends
        final = number[[state for state in accepting if state in states]]
        _, first = np.unique(token_class, return_index=True)
        speaks = np.isin(token, first)  # one token speaks for its class
        everything = np.arange(count + 2)
        source = np.concatenate([source[speaks], final, np.full(count + 2, end)])
        label = np.concatenate([token_class[token[speaks]], np.full(len(final), ends), everything])
        target = np.concatenate([target[speaks], np.full(len(final) + count + 2, end)])
        order = np.lexsort((label, source))
        accepts = np.zeros(end + 1, bool)
        accepts[[*final, end]] = True
        return cls(
            torch.from_numpy(token_class),
            source[order], label[order], target[order],
            accepts, tuple(int(number[start]) for start in starts), count + 2,
        )  # fmt: skip

    @property
    def states(self) -> int:
        """S, with END."""
        return len(self.accepting)

    @property
    def ends(self) -> int:
        """The class of the end tokens."""
        return self.classes - 2

    @cached_property
    def can_end(self) -> bool:
        """Whether there is an end token."""
        return bool((self.token_class == self.ends).any())

    def shortest(self, start: int) -> int:
        """Tokens of the shortest text from a start, without its end token."""
        here = np.arange(self.states) == start
        text = self.label != self.ends
        for length in range(self.states):
            if (here & self.accepting).any():
                return length
            edges, here = here[self.source] & text, np.zeros(self.states, bool)
            here[self.target[edges]] = True
        raise AssertionError("an answer can be completed from every state")

    @cached_property
    def first(self) -> Array:
        """[S + 1] where the edges of each state begin."""
        return np.searchsorted(self.source, np.arange(self.states + 1))

    @cached_property
    def class_of(self) -> list[int]:
        """`token_class` as integers."""
        return self.token_class.tolist()

    @cached_property
    def fan(self) -> Array:
        """[S, D] the edges of each state, then -1."""
        count = np.diff(self.first)
        place = np.arange(int(count.max()))
        return np.where(place < count[:, None], self.first[:-1, None] + place, -1)

    @cached_property
    def fans(self) -> tuple[Array, Array, Array]:
        """[S, D] the classes and next states of the edges of each state, then any; and 0 for an
        edge, minus infinity for what is none."""
        return self.label[self.fan], self.target[self.fan], np.where(self.fan < 0, -np.inf, 0.0)

    @cached_property
    def by_class(self) -> tuple[Array, Array, Array, Array]:
        """[V] tokens by their classes, the classes that have any, where each of those begins, and
        [V] which of them each token has."""
        order = np.argsort(self.token_class.numpy(), kind="stable")
        return order, *groups_of(self.token_class.numpy()[order])

    def step(self, state: int, token: int) -> int:
        """The state after a token; `DEAD` if there is none."""
        if state == DEAD:
            return DEAD
        low, high = self.first[state], self.first[state + 1]
        label = self.class_of[token]
        at = low + int(np.searchsorted(self.label[low:high], label))
        return int(self.target[at]) if at < high and self.label[at] == label else DEAD

    def walk(self, tokens: Sequence[int], state: int) -> int:
        """The state after tokens, from a state."""
        for token in tokens:
            state = self.step(state, token)
        return state

    def completable(self, room: int, held: int) -> list[Array]:
        """For 0 to `room` tokens left, [S] bool: from which states that many tokens, no more and no
        fewer, lead to an accepting state. What follows an end token counts as tokens too.

        Args:
            room: tokens of the whole text.
            held: so many of its first tokens may not be end tokens.
        """
        if (room, held) in self.reckoned:
            return self.reckoned[room, held]
        found = [self.accepting]
        no_end = self.label != self.ends
        while len(found) <= room:
            edges = found[-1][self.target]
            if room - len(found) < held:
                edges = edges & (no_end | (self.source == self.states - 1))
            before = np.logical_or.reduceat(edges, self.first[:-1])
            same = np.array_equal(before, found[-1])
            found.append(found[-1] if same else before)  # most of a long list is one array
            if same and room - len(found) >= held:
                found += [found[-1]] * (room - held + 1 - len(found))
        self.reckoned.clear()  # few calls have other lengths than the last one
        self.reckoned[room, held] = found
        return found


def groups_of(values: Array) -> tuple[Array, Array, Array]:
    """The values of a sorted array, where each begins, and which of them each element is."""
    begins = np.empty(len(values), bool)
    begins[:1] = True
    np.not_equal(values[1:], values[:-1], out=begins[1:])
    first = np.flatnonzero(begins)
    return values[first], first, begins.cumsum() - 1


def _useful(
    source: Array, target: Array, starts: Collection[int], accepting: Collection[int]
) -> set[int]:
    """The states that a start leads to, and that lead to an accepting one."""
    if not len(source):
        return {*starts} & {*accepting}
    pairs = np.unique(np.stack([source, target], 1), axis=0).tolist()
    ahead: dict[int, list[int]] = {}
    back: dict[int, list[int]] = {}
    for before, after in pairs:
        ahead.setdefault(before, []).append(after)
        back.setdefault(after, []).append(before)
    return _reached(set(starts), ahead) & _reached(set(accepting), back)


def _reached(states: set[int], edges: dict[int, list[int]]) -> set[int]:
    found, left = set(states), list(states)
    while left:
        for state in edges.get(left.pop(), ()):
            if state not in found:
                found.add(state)
                left.append(state)
    return found


def _classes(source: Array, token: Array, target: Array, vocabulary: int) -> tuple[Array, int]:
    """[V] the class of each token, in order of the classes' first tokens, and their number K;
    tokens without an edge have class K + 1. Columns of edges are compared by their hashes."""
    column = np.zeros(vocabulary, np.uint64)
    with np.errstate(over="ignore"):
        edge = (source.astype(np.uint64) << np.uint64(32)) + target.astype(np.uint64)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            edge = (edge + np.uint64(0x9E3779B97F4A7C15)) ^ (edge >> np.uint64(shift))
            edge = edge * np.uint64(factor)
        np.add.at(column, token, edge ^ (edge >> np.uint64(31)))
    used = np.zeros(vocabulary, bool)
    used[token] = True
    _, first, inverse = np.unique(column[used], return_index=True, return_inverse=True)
    place = np.empty(len(first), np.int64)
    place[np.argsort(first)] = np.arange(len(first))
    found = np.full(vocabulary, len(first) + 1)
    found[used] = place[inverse]
    return found, len(first)
