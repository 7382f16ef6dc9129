"""Candidates for a row's next tokens: a chain, or a tree of several continuations.

Draft logits give guesses at each of the next positions. Along a path the bigram head corrects each
guess by the one before it. `chain` follows the likeliest path; `best_first` pops the likeliest
unvisited node from a heap, again and again (DDTree, 2604.12989). A model's own tokens decide which
candidates are accepted, so nothing here can change what is written.
This file is copied into converted folders: it imports torch and its neighbours alone.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import exp

import torch
from torch import Tensor

from .head import BigramHead

GUESSES = 16  # the likeliest tokens of a position, among which candidates are chosen
SIBLINGS = 8  # candidates that can follow one token


@dataclass
class Tree:
    """Candidates of one row, parents before children.

    Attributes:
        tokens: of each node. parents: the node that each follows; -1: the newest token.
        depths: 1 for a token right after the newest.
        chances: how likely it is that the node is accepted.
        blocks: the nodes (-1: the newest token) behind which masks stand.
    """

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    chances: list[float] = field(default_factory=list)
    blocks: list[int] = field(default_factory=lambda: [-1])

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def is_chain(self) -> bool:
        """Whether no token is followed by two nodes."""
        return self.parents == list(range(-1, len(self) - 1))

    def add(self, token: int, parent: int, depth: int, chance: float) -> None:
        """Add a node."""
        self.tokens.append(token)
        self.parents.append(parent)
        self.depths.append(depth)
        self.chances.append(chance)

    def cut(self, nodes: int) -> None:
        """Keep the first nodes only."""
        for values in (self.tokens, self.parents, self.depths, self.chances):
            del values[nodes:]

    def path(self, node: int) -> list[int]:
        """The nodes from the first to `node`; none for -1."""
        found = []
        while node >= 0:
            found.append(node)
            node = self.parents[node]
        return found[::-1]

    def branches(self) -> tuple[list[int], list[int]]:
        """`enter` and `leave` of each node, as `Slots` has them; the newest token enters as 0."""
        count = len(self)
        size = [1] * count
        for node in range(count - 1, -1, -1):
            if (parent := self.parents[node]) >= 0:
                size[parent] += size[node]
        enter, free = [0] * count, [1] * (count + 1)  # the next number below each node (last: root)
        for node, parent in enumerate(self.parents):
            enter[node] = free[parent]
            free[parent] += size[node]
            free[node] = enter[node] + 1
        return enter, [e + s for e, s in zip(enter, size, strict=True)]

    def walk(self, tokens: list[int]) -> int:
        """The node at which a walk ends that goes to the child that holds a node's own token.

        Args:
            tokens: the token that follows the newest token, then those that follow each node.
        """
        children = {
            (parent, token): node
            for node, (parent, token) in enumerate(zip(self.parents, self.tokens, strict=True))
        }
        node = -1
        while (found := children.get((node, tokens[node + 1]))) is not None:
            node = found
        return node

    def ends(self) -> list[float]:
        """How likely it is that a walk ends at the newest token, and at each node."""
        left = [1.0, *self.chances]
        for parent, chance in zip(self.parents, self.chances, strict=True):
            left[parent + 1] -= chance
        return [max(0.0, chance) for chance in left]


@dataclass(frozen=True)
class Guesses:
    """Guesses for the K positions after the next token of each row.

    Attributes:
        tokens: [R, K, C] the likeliest ones.
        first: [R, C] log-probabilities at the first of the positions.
        then: [R, K - 1, C, C] those at the others, given each guess at the position before.
    """

    tokens: Tensor
    first: Tensor
    then: Tensor

    @classmethod
    def of(
        cls, scores: Tensor, newest: Tensor, head: BigramHead | None, temperature: float
    ) -> Guesses:
        """The guesses from the scores of draft slots.

        Args:
            scores: [R, K, V] after temperature and filters, with the noise of their positions.
            newest: [R] the token before the first of the positions.
            head: corrects a guess by the one before it; None: each ignores the others.
            temperature: by which the head's bias is divided.
        """
        scores, tokens = scores.topk(min(GUESSES, scores.shape[-1]), -1)
        rows, drafts, count = tokens.shape
        first = scores[:, 0]
        then = scores[:, 1:, None].expand(rows, drafts - 1, count, count)
        if head is not None:
            after = head.after.T  # [V, r]: the columns that are needed are gathered as rows
            newest = newest.to(tokens.device)
            first = (
                first
                + torch.einsum("rd,rcd->rc", head.before[newest], after[tokens[:, 0]]).to(first)
                / temperature
            )
            bias = head.before[tokens[:, :-1]] @ after[tokens[:, 1:]].transpose(-1, -2)
            then = then + bias.to(then) / temperature
        return cls(tokens.cpu(), first.log_softmax(-1).cpu(), then.log_softmax(-1).cpu())

    def chain(self, length: int) -> list[Tree]:
        """The likeliest guess at each position, given the one before it."""
        rows = torch.arange(len(self.tokens))
        chance, place = self.first.max(-1)
        found, chances = [self.tokens[rows, 0, place]], [chance]
        for depth in range(1, length):
            given = self.then[rows, depth - 1, place]
            step, place = given.max(-1)
            found.append(self.tokens[rows, depth, place])
            chances.append(chances[-1] + step)
        parents, depths = list(range(-1, length - 1)), list(range(1, length + 1))
        return [
            Tree(tokens, parents[:], depths[:], chances)
            for tokens, chances in zip(
                torch.stack(found, 1).tolist(), torch.stack(chances, 1).exp().tolist(), strict=True
            )
        ]

    def best_first(self, nodes: int) -> list[Tree]:
        """The likeliest nodes of each row's tree."""
        siblings = min(SIBLINGS, self.first.shape[-1])
        first = [part.tolist() for part in self.first.topk(siblings, -1)]
        then = [part.tolist() for part in self.then.topk(siblings, -1)]
        tokens = self.tokens.tolist()
        return [
            _grow(tokens[row], *(part[row] for part in (*first, *then)), nodes)
            for row in range(len(tokens))
        ]


def _grow(
    tokens: list[list[int]],
    first: list[float],
    first_places: list[int],
    then: list[list[list[float]]],
    then_places: list[list[list[int]]],
    nodes: int,
) -> Tree:
    """The likeliest nodes of a row, from log-probabilities in descending order and the places of
    their tokens among the guesses."""
    tree = Tree()
    # (-log chance, parent, its -log chance, depth, place of the parent's token, rank)
    heap = [(-first[0], -1, 0.0, 1, 0, 0)]
    while heap and len(tree) < nodes:
        own, parent, before, depth, given, rank = heapq.heappop(heap)
        scores = first if depth == 1 else then[depth - 2][given]
        places = first_places if depth == 1 else then_places[depth - 2][given]
        node, place = len(tree), places[rank]
        tree.add(tokens[depth - 1][place], parent, depth, exp(-own))
        if rank + 1 < len(scores):
            heapq.heappush(
                heap, (before - scores[rank + 1], parent, before, depth, given, rank + 1)
            )
        if depth < len(tokens):
            follows = own - then[depth - 1][place][0]
            heapq.heappush(heap, (follows, node, own, depth + 1, place, 0))
    return tree


def shapes(trees: list[Tree]) -> Iterator[tuple[int, ...]]:
    """Which node each node and each block follows, by row: equal shapes have equal masks."""
    return ((*tree.parents, -2, *tree.blocks) for tree in trees)
