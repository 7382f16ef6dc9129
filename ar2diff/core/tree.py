"""Candidates for a row's next tokens: a chain, or a tree of several continuations.

Draft logits give guesses at each of the next positions. Along a path the head corrects each guess
by those before it. `chain` follows the likeliest path; `likeliest` takes the likeliest nodes of all
paths (DDTree, 2604.12989). A model's own tokens decide which candidates are accepted, so nothing
here can change what is written.
This file is copied into converted folders: it imports torch and its neighbours alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, compress
from math import exp
from operator import mul
from typing import Any

import torch
from torch import Tensor

from .head import DraftHead
from .transfer import upload

BEAM = 8  # paths that are followed, and candidates that can follow one token


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
    blocks: list[int] = field(default_factory=list)

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

    def keep(self, nodes: list[bool]) -> None:
        """Drop nodes, none of which is followed by one that stays."""
        number = [*accumulate(nodes, initial=0)]
        self.parents = [number[parent] if parent >= 0 else -1 for parent in self.parents]
        for name in ("tokens", "parents", "depths", "chances"):
            setattr(self, name, [*compress(getattr(self, name), nodes)])

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

    def firsts(self, path: list[int]) -> list[tuple[int, float]]:
        """The likeliest child of each node of a walk along `path`, and its chance after that node:
        the walk goes there or ends, or goes to another child."""
        found: dict[int, int] = {}
        for node, parent in enumerate(self.parents):  # siblings are in descending order
            found.setdefault(parent, node)
        chances = [*self.chances, 1.0]  # the last one: of the newest token
        return [
            (found[node], chances[found[node]] / max(chances[node], 1e-9))
            for node in (-1, *path)
            if node in found
        ]

    def refused(self, node: int) -> list[int]:
        """The likeliest tokens that were to follow the node at which a walk has ended."""
        tokens = []
        for place, parent in enumerate(self.parents):  # siblings are in descending order
            if parent == node:
                tokens.append(self.tokens[place])
                node = place
        return tokens

    def ends(self) -> list[float]:
        """How likely it is that a walk ends at the newest token, and at each node."""
        left = [1.0, *self.chances]
        for parent, chance in zip(self.parents, self.chances, strict=True):
            left[parent + 1] -= chance
        return [max(0.0, chance) for chance in left]


@dataclass(frozen=True)
class Reached:
    """Where the walks of all rows end, found on a device without telling the host.

    Attributes:
        newest: [R] the token that follows the end. depth: [R] how many candidates are accepted.
        block: [R] which of the tree's blocks stands behind the end; 0 if none does.
    """

    newest: Tensor
    depth: Tensor
    block: Tensor

    @classmethod
    def of(cls, trees: list[Tree], own: Tensor) -> Reached:
        """The same ends as `Tree.walk` finds.

        Args:
            own: [R, N + 1] the tokens that follow the newest one and each candidate.
        """
        size = own.shape[1]
        table = torch.tensor([_places(tree, size) for tree in trees]).unbind(1)
        parents, tokens, depths, blocks = upload(own.device, *table)
        place = torch.zeros_like(own[:, :1])  # 0: at the newest token; n + 1: at node n
        for _ in range(max((max(tree.depths) for tree in trees if len(tree)), default=0)):
            child = (parents == place) & (tokens == own.gather(1, place))
            found, at = child.int().max(1, keepdim=True)
            place = torch.where(found > 0, at, place)
        return cls(*(x.gather(1, place)[:, 0] for x in (own, depths, blocks)))


def _places(tree: Tree, size: int) -> list[list[int]]:
    """Parents, tokens, depths and blocks of the newest token (first), and of each node."""
    blocks = [0] * size
    for number, node in enumerate(tree.blocks):
        blocks[node + 1] = number
    spare = size - 1 - len(tree)
    return [
        [-1, *(parent + 1 for parent in tree.parents), *[-1] * spare],
        [-1, *tree.tokens, *[-1] * spare],
        [0, *tree.depths, *[0] * spare],
        blocks,
    ]


@dataclass(frozen=True)
class Guesses:
    """Guesses for the K positions after the newest token of each row.

    Attributes:
        scores: [R, K, V] of draft slots, after temperature and filters, with the noise of their
            positions.
        newest: [R] the token before the first of the positions.
        head: corrects a guess by those before it; None: each ignores the others.
        gates: [R, K, r] of the head. temperature: by which its bias is divided.
        trust: added to the log-odds of the best guess at each position.
        read: what `worked_out` found, on the host; None: nothing yet.
    """

    scores: Tensor
    newest: Tensor
    head: DraftHead | None
    gates: Tensor | None
    temperature: float
    trust: float = 0.0
    read: list[Tensor] | None = None

    @cached_property
    def _by_place(self) -> list[tuple[Tensor, Tensor | None]]:
        """Scores [R, V] and gates [R, r] of each position."""
        scores = self.scores.unbind(1)
        gates = (None,) * len(scores) if self.head is None else self.gates.unbind(1)
        return [*zip(scores, gates, strict=True)]

    def _after(self, place: int, memory: Tensor | None) -> Tensor:
        """[R, V] scores at a position after one path in each row, whose memory is [R, r]; [R, B, V]
        after B of them, whose memory is [R, B, r]."""
        scores, gates = self._by_place[place]
        if memory is None:
            return scores
        after, share = self.head.after, 1 / self.temperature
        if memory.dim() == 2 and scores.dtype == after.dtype:
            return torch.addmm(scores, memory * gates, after, alpha=share)
        if memory.dim() == 3:
            scores, gates = scores[:, None], gates[:, None]
        return torch.add(scores, (memory * gates) @ after, alpha=share)

    def _remember(self, tokens: Tensor, memory: Tensor | None) -> Tensor | None:
        """The head's memory [..., r] after tokens [...]."""
        return None if self.head is None else self.head.remember(tokens, memory)

    def chain(self, length: int, least: float = 0.0) -> list[Tree]:
        """The likeliest guess at each position, given those before it; up to the position where no
        row's chain has a chance of `least`, if the host knows it."""
        tokens, sure = self.read[:2] if self.read else self._chain(length, least)
        depths = list(range(1, tokens.shape[1] + 1))
        return [
            Tree(
                line, [d - 2 for d in depths], depths[:], [*accumulate(map(self._trusted, p), mul)]
            )
            for line, p in zip(tokens.tolist(), sure.tolist(), strict=True)
        ]

    def _chain(self, length: int, least: float = 0.0) -> tuple[Tensor, Tensor]:
        """Tokens [R, L] of the chains, and how likely each is after those before it, on the
        device."""
        found, sure, memory = [self.newest], [], None
        chances = [1.0] * len(self.newest)
        for place in range(length):
            memory = self._remember(found[-1], memory)
            best = self._after(place, memory).softmax(-1).max(-1)
            found.append(best.indices)
            sure.append(best.values)
            if least and best.values.is_cpu:  # nothing waits for a device before the end
                chances = [*map(mul, chances, map(self._trusted, best.values.tolist()))]
                if max(chances) < least:
                    break
        return torch.stack(found[1:], 1), torch.stack(sure, 1)

    def _trusted(self, chance: float) -> float:
        """The chance of a best guess, after `trust` was added to its log-odds."""
        odds = exp(self.trust)
        return chance * odds / (1 + chance * (odds - 1))

    def likeliest(self, nodes: int) -> list[Tree]:
        """The likeliest nodes of each row's tree, in descending order.

        The guesses at a position are made after the `BEAM` likeliest paths to it, and no deeper
        than a path that ranks among the nodes, if the host knows it.
        """
        found = self.read[-3 * self.scores.shape[1] :] if self.read else self._levels(nodes)
        lists = [part.tolist() for part in found]
        levels = [lists[n : n + 3] for n in range(0, len(lists), 3)]
        by_row = [
            [[part[row] for part in level] for level in levels] for row in range(len(lists[0]))
        ]
        return [_tree_of(own, nodes) for own in by_row]

    def _levels(self, nodes: int) -> list[Tensor]:
        """Of the paths to each position, on the device: their last tokens, their parents among the
        paths to the position before, and the logarithms of their chances, [R, B] each."""
        rows, beam = len(self.newest), min(BEAM, nodes)
        memory = self._remember(self.newest[:, None], None)
        chance = self.scores.new_zeros(rows, 1)
        levels: list[Tensor] = []
        promised: list[list[list[float]]] = []  # the chances, on the host
        for place in range(self.scores.shape[1]):
            after = self._after(place, memory).log_softmax(-1)
            after = after.view(rows, -1, after.shape[-1])
            best, tokens = after.topk(min(beam, after.shape[-1]), -1)
            if self.trust:  # the others share what is left
                best = best - (best[..., :1].exp() * (exp(self.trust) - 1)).log1p()
                best[..., 0] += self.trust
                best = best.clamp(max=0.0)  # a child is never likelier than its parent
            paths, size = (chance[:, :, None] + best).flatten(1), best.shape[-1]
            tokens = tokens.expand(-1, chance.shape[1], -1).flatten(1)
            chance, at = paths.topk(min(beam, paths.shape[1]), -1)
            tokens, parents = tokens.gather(1, at), at // size
            levels += tokens, parents, chance
            if chance.is_cpu:  # nothing waits for a device before the end
                promised.append(chance.tolist())
                if place and all(_ranks_below(promised, row, nodes) for row in range(rows)):
                    break
            if memory is not None:
                own = parents[..., None].expand(-1, -1, memory.shape[-1])
                memory = self._remember(tokens, memory.gather(1, own))
        return levels

    def worked_out(self, chains: bool, nodes: int) -> list[Tensor]:
        """On the device, what `chain` (if asked) and `likeliest` need of all positions.

        Args:
            nodes: of the trees; 0: none are asked.
        """
        chain = self._chain(self.scores.shape[1]) if chains else ()
        return [*chain, *(self._levels(nodes) if nodes else ())]

    def on_host(self, found: list[Tensor], rows: list[int]) -> Guesses:
        """The guesses of some of the rows, from what `worked_out` found, on the host."""
        at = torch.tensor(rows)
        return replace(self, read=[part[at] for part in found])


def _ranks_below(promised: list[list[list[float]]], row: int, nodes: int) -> bool:
    """Whether enough nodes are likelier than the likeliest one of the last level."""
    least = promised[-1][row][0]
    return sum(c > least for level in promised[:-1] for c in level[row]) >= nodes


def _tree_of(levels: list[list[list[Any]]], nodes: int) -> Tree:
    """The likeliest nodes of a row, from the tokens, parents in the level before and log-chances of
    each level. A parent is never less likely than its children."""
    order = sorted(
        (-chance, depth, place)
        for depth, level in enumerate(levels)
        for place, chance in enumerate(level[2])
    )
    tree, number = Tree(), {(-1, 0): -1}
    for cost, depth, place in order[:nodes]:
        tokens, parents, _ = levels[depth]
        number[depth, place] = len(tree)
        parent = number[depth - 1, parents[place]] if depth else -1
        tree.add(tokens[place], parent, depth + 1, exp(-cost))
    return tree


def shapes(trees: list[Tree]) -> Iterator[tuple[int, ...]]:
    """Which node each node and each block follows, by row: equal shapes have equal masks."""
    return ((*tree.parents, -2, *tree.blocks) for tree in trees)
