"""Paths of an automaton through the positions of blocks: sums, best paths and samples.

A row's block is a row of columns. In a span of columns the automaton reads one token in each, and
must be accepting where the span closes; if the span goes on behind the block, its state there must
be one from which the rest can be completed. A column has a log weight for each class of tokens, and
a path the product of its weights. All of it is exact, by dynamic programming over states x columns,
in logarithms: no weight is so small that a path could get lost.
This file is copied into converted folders: it imports numpy and its neighbours alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from .automaton import Array, Automaton, groups_of

NEVER = -np.inf
TINY = np.finfo(float).tiny
TIE = 1e-4  # nats; paths that differ by less are equally likely but for rounding


@dataclass(frozen=True)
class Layer:
    """The edges that a column can take in any row, sorted by their states.

    Attributes:
        source, label, target: [E'] as of an `Automaton`.
        sources: [S'] the states that have any; first, place: where the edges of each begin, and
            [E'] which of them each edge leaves.
    """

    source: Array
    label: Array
    target: Array
    sources: Array
    first: Array
    place: Array

    @classmethod
    def of(cls, own: Automaton, states: Array) -> Layer:
        """The edges of states [S'], in ascending order."""
        edges = own.fan[states].ravel()
        edges = edges[edges >= 0]
        source = own.source[edges]
        return cls(source, own.label[edges], own.target[edges], *groups_of(source))

    @cached_property
    def by_target(self) -> tuple[Array, Array, Array]:
        """[E'] their order by their next states, those, and where the edges of each begin."""
        return self._sorted(self.target)

    @cached_property
    def by_label(self) -> tuple[Array, Array, Array]:
        """The same by their classes."""
        return self._sorted(self.label)

    @staticmethod
    def _sorted(values: Array) -> tuple[Array, Array, Array]:
        order = np.argsort(values, kind="stable")
        found, first, _ = groups_of(values[order])
        return order, found, first


@dataclass(frozen=True)
class Lattice:
    """R blocks of W columns.

    Attributes:
        inside: [R, W] bool, columns of a span. closes: [R, W] bool, the last columns of spans.
        held: [R, W] bool, columns that cannot hold an end token.
        begin: [R] the state before the first column; outside of a span the start of the next one.
        resume: [R, W] the start of the span that follows a column.
        limit: [R, S] bool, states that are allowed behind the last column.
        weights: [R, W, C] log weights; outside of spans they do not matter.
        layers: of each column; None where it is outside of all spans.
    """

    automaton: Automaton
    inside: Array
    closes: Array
    held: Array
    begin: Array
    resume: Array
    limit: Array
    weights: Array
    layers: list[Layer | None]

    def filled(self, columns: Array, weights: Array | float) -> Lattice:
        """The same with other weights [N, C] in some columns, [R, W] bool."""
        found = self.weights.copy()
        found[columns] = weights
        found[self.held, self.automaton.ends] = NEVER
        return replace(self, weights=found)

    def total(self, behind: Sequence[Array]) -> Array:
        """[R] what all columns weigh, of `behind`."""
        return behind[-1][np.arange(len(self.begin)), self.begin]

    def behind(self, best: bool) -> list[Array]:
        """For each column, [R, S] what the columns behind it weigh in all from each of the states
        after it, `NEVER` for a state that is not allowed there; at last the same of all columns.

        Args:
            best: the weight of the best path instead of the sum of all.
        """
        own, rows = self.automaton, np.arange(len(self.begin))
        value, found = np.where(self.limit, 0.0, NEVER), []
        for column, layer, closes, full in self._columns()[::-1]:
            if closes is not None:
                ended = value[rows, self.resume[:, column], None]
                value = np.where(closes, np.where(own.accepting, ended, NEVER), value)
            found.append(value)
            if layer is not None:
                edges = self.weights[:, column].take(layer.label, 1) + value.take(layer.target, 1)
                before = np.full_like(value, NEVER)
                before[:, layer.sources] = (
                    np.maximum.reduceat(edges, layer.first, axis=1)
                    if best
                    else log_sum(edges, layer.first, layer.place)
                )
                value = before if full else np.where(self.inside[:, column, None], before, value)
        return [*found[::-1], value]

    def possible(self, behind: Sequence[Array]) -> Array:
        """[R, W, C] bool, the classes that a column has on any path, whatever it weighs; all of
        them outside of spans.

        Args:
            behind: of `behind`.
        """
        own, rows, fits = self.automaton, np.arange(len(self.begin)), self.weights > NEVER
        found, value = np.ones(fits.shape, bool), np.zeros((len(rows), own.states), bool)
        value[rows, self.begin] = True
        for column, layer, closes, full in self._columns():
            if layer is not None:
                ways = value.take(layer.source, 1) & fits[:, column].take(layer.label, 1)
                ways &= behind[column].take(layer.target, 1) > NEVER
                here, after = np.zeros((len(rows), own.classes), bool), np.zeros_like(value)
                for side, (order, names, first) in (
                    (here, layer.by_label),
                    (after, layer.by_target),
                ):
                    side[:, names] = np.logical_or.reduceat(ways[:, order], first, axis=1)
                inside = self.inside[:, column, None]
                found[:, column] = np.where(inside, here, True)
                value = after if full else np.where(inside, after, value)
            if closes is not None:
                ended = np.zeros_like(value)
                ended[rows, self.resume[:, column]] = (value & own.accepting).any(1)
                value = np.where(closes, ended, value)
        return found

    def _columns(self) -> list[tuple[int, Layer | None, Array | None, bool]]:
        """Number and layer of each column, [R, 1] where spans close, if any does, and whether all
        rows are inside of a span."""
        closing, full = self.closes.any(0).tolist(), self.inside.all(0).tolist()
        return [
            (column, layer, self.closes[:, column, None] if closing[column] else None, full[column])
            for column, layer in enumerate(self.layers)
        ]

    def paths(self, behind: Sequence[Array], u: Array | None) -> tuple[Array, Array]:
        """The classes [R, W] that a path reads in each row, -1 outside of spans: the best path, or
        one that is drawn; and what is left of the numbers that drew it.

        Args:
            behind: of `behind(best=u is None)`.
            u: [R, W] numbers in [0, 1).
        """
        own, rows, state = self.automaton, np.arange(len(self.begin)), self.begin
        labels, rest = np.full(self.inside.shape, -1), np.zeros(self.inside.shape)
        for column in range(self.inside.shape[1]):
            label, target, padding = (values[state] for values in own.fans)
            weights = self.weights[rows[:, None], column, label] + padding
            weights += behind[column][rows[:, None], target]
            if u is None:
                chosen = (weights >= weights.max(1, keepdims=True) - TIE).argmax(1)
            else:
                chosen, rest[:, column] = _drawn(weights, u[:, column])
            inside, closes = self.inside[:, column], self.closes[:, column]
            labels[inside, column] = label[rows, chosen][inside]
            state = np.where(inside, target[rows, chosen], state)
            state = np.where(closes, self.resume[:, column], state)
        return labels, rest if u is None else np.where(self.inside, rest, u)


def layers_of(
    own: Automaton, inside: Array, closes: Array, begin: Array, resume: Array
) -> list[Layer | None]:
    """The layers of a `Lattice`, by the states that the rows can have reached."""
    states, found = np.unique(begin), []
    for column in range(inside.shape[1]):
        layer = Layer.of(own, states) if inside[:, column].any() else None
        found.append(layer)
        reached = np.zeros(own.states, bool)
        if layer is not None:
            reached[layer.target] = True
        if not inside[:, column].all():
            reached[states] = True
        reached[resume[closes[:, column], column]] = True
        states = np.flatnonzero(reached)
    return found


def _drawn(weights: Array, u: Array) -> tuple[Array, Array]:
    """[R] which of each row's weights [R, D] a number in [0, 1) draws, and [R] where it lies in the
    share of that one, again from 0 to 1."""
    top = weights.max(1, keepdims=True)
    each = np.exp(weights - np.where(top == NEVER, 0.0, top))
    mass = each.cumsum(1)
    point = u * mass[:, -1]
    beyond = mass > point[:, None]
    last = each.shape[1] - 1 - (each[:, ::-1] > 0).argmax(1)  # rounding may point beyond it
    chosen = np.minimum(np.where(beyond.any(1), beyond.argmax(1), last), last)
    rows = np.arange(len(u))
    share = np.maximum(each[rows, chosen], TINY)
    rest = (point - mass[rows, chosen] + share) / share
    return chosen, np.clip(rest, 0.0, 1 - 2**-53)


def log_sum(values: Array, first: Array, place: Array) -> Array:
    """[R, N] the logarithm of the sum of exponentials of values [R, E], likewise.

    Args:
        place: [E] which of the N sums each value belongs to.
    """
    top = np.maximum.reduceat(values, first, axis=1)
    top[top == NEVER] = 0.0
    total = np.add.reduceat(np.exp(values - top.take(place, 1)), first, axis=1)
    return np.log(total, out=np.full_like(total, NEVER), where=total > 0) + top
