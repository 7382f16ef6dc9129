"""Paths of an automaton through the positions of blocks: sums, best paths and samples.

A row's block is a row of columns. In a span of columns the automaton reads one token in each, and
must be accepting where the span closes; if the span goes on behind the block, its state there must
be one from which the rest can be completed. A column has a log weight for each class of tokens, and
a path the product of its weights. All of it is exact, by dynamic programming over states x columns
in both directions, in logarithms: no weight is so small that a path could get lost.
This file is copied into converted folders: it imports numpy and its neighbours alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from .automaton import Array, Automaton

NEVER = -np.inf
TIE = 1e-4  # nats; paths that differ by less are equally likely but for rounding


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
    """

    automaton: Automaton
    inside: Array
    closes: Array
    held: Array
    begin: Array
    resume: Array
    limit: Array
    weights: Array

    def filled(self, columns: Array, weights: Array) -> Lattice:
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
        for column in reversed(range(self.inside.shape[1])):
            closes, inside = self.closes[:, column, None], self.inside[:, column, None]
            if closes.any():
                ended = np.where(own.accepting, value[rows, self.resume[:, column], None], NEVER)
                value = np.where(closes, ended, value)
            found.append(value)
            if inside.any():
                edges = self.weights[:, column, own.label] + value[:, own.target]
                first = own.first[:-1]
                before = _best(edges, first) if best else _sum(edges, first, own.source)
                value = before if inside.all() else np.where(inside, before, value)
        return [*found[::-1], value]

    def ahead(self) -> list[Array]:
        """For each column, [R, S] what the columns before it weigh in all, by the state there."""
        own, rows = self.automaton, np.arange(len(self.begin))
        value = np.full((len(rows), own.states), NEVER)
        value[rows, self.begin] = 0.0
        found = [value]
        for column in range(self.inside.shape[1] - 1):
            closes, inside = self.closes[:, column, None], self.inside[:, column, None]
            if inside.any():
                order, first, targets, place = own.by_target
                edges = self.weights[:, column, own.label] + value[:, own.source]
                after = np.full_like(value, NEVER)
                after[:, targets] = _sum(edges[:, order], first, place)
                value = np.where(inside, after, value)
            if closes.any():
                ended = np.full_like(value, NEVER)
                accepted = np.where(own.accepting, value, NEVER)
                every = np.zeros(own.states, int)
                ended[rows, self.resume[:, column]] = _sum(accepted, every[:1], every)[:, 0]
                value = np.where(closes, ended, value)
            found.append(value)
        return found

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
            edges = own.fan[state]
            label, target = own.label[edges], own.target[edges]
            weights = self.weights[rows[:, None], column, label]
            weights = np.where(edges < 0, NEVER, weights + behind[column][rows[:, None], target])
            if u is None:
                chosen = (weights >= weights.max(1, keepdims=True) - TIE).argmax(1)
            else:
                chosen, rest[:, column] = _drawn(weights, u[:, column])
            inside, closes = self.inside[:, column], self.closes[:, column]
            labels[inside, column] = label[rows, chosen][inside]
            state = np.where(inside, target[rows, chosen], state)
            state = np.where(closes, self.resume[:, column], state)
        return labels, rest if u is None else np.where(self.inside, rest, u)

    def marginal(self, column: int, labels: Array, ahead: Array, behind: Array) -> Array:
        """[R] the sum over all paths of what they weigh without a column, of those that have the
        class there that `labels` [R] says; 0 where it is -1.

        Args:
            ahead, behind: [R, S] of the column.
        """
        own, found = self.automaton, np.zeros(len(labels))
        order, bounds = own.by_label
        for label in set(labels.tolist()) - {-1}:
            edges, rows = order[bounds[label] : bounds[label + 1]], np.flatnonzero(labels == label)
            ways = (
                ahead[rows[:, None], own.source[edges]] + behind[rows[:, None], own.target[edges]]
            )
            found[rows] = _sum(ways, np.zeros(1, int), np.zeros(len(edges), int))[:, 0]
        return found

    def marginals(self, column: int, ahead: Array, behind: Array) -> Array:
        """[R, C] the same of all classes."""
        own = self.automaton
        order, bounds = own.by_label
        weights = (ahead[:, own.source] + behind[:, own.target])[:, order]
        return _sum(weights, bounds[:-1], own.label[order])  # END has an edge of every class


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
    share = np.maximum(each[rows, chosen], np.finfo(float).tiny)
    rest = (point - mass[rows, chosen] + share) / share
    return chosen, np.clip(rest, 0.0, 1 - 2**-53)


def _best(values: Array, first: Array) -> Array:
    """[R, N] the largest of the values [R, E] from each `first` [N] to the next."""
    return np.maximum.reduceat(values, first, axis=1)


def _sum(values: Array, first: Array, place: Array) -> Array:
    """[R, N] the logarithm of the sum of exponentials of values [R, E], likewise.

    Args:
        place: [E] which of the N sums each value belongs to.
    """
    top = np.maximum.reduceat(values, first, axis=1)
    top[top == NEVER] = 0.0
    total = np.add.reduceat(np.exp(values - top[:, place]), first, axis=1)
    with np.errstate(divide="ignore"):
        return np.log(total) + top
