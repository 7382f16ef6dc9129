"""How many candidates a forward of speculation verifies, and behind which of them it drafts.

A forward gets slower with every slot, and how much slower depends on the model, the device and the
batch. So the numbers are chosen while decoding, by expected acceptance against measured cost
(DSpark, 2607.05147, algorithm 1): whatever adds more tokens than its time is worth is added, in
descending order of chance, up to the first that does not. What is written never depends on it.
This file is copied into converted folders: it imports torch and its neighbours alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from .tree import Guesses, Tree

FIRST = 3  # drafts behind a candidate at the start
MOST = 32  # candidates of a row
KEEP = 0.9  # of a running mean, at each forward
RETRY = 32  # plain forwards after which drafting is tried again, and
TRIED = 4  # for how many forwards
CHANCES = (0.7, 0.5, 0.35)  # that the first drafts are right, before any was verified


class Pace:
    """Fixed numbers: the same tokens are drafted behind every candidate.

    Args:
        length: drafts behind a candidate; 0: none.
        nodes: candidates in a tree; None: a chain of `length`.
    """

    def __init__(self, length: int, nodes: int | None = None):
        self.length, self.nodes = length, nodes

    @property
    def reach(self) -> int:
        """The most positions beyond a row's front that a forward reads."""
        return 2 * self.length + 1 if self.length else 0

    @property
    def most(self) -> int:
        """The most slots of a forward besides the certain tokens."""
        nodes = self.nodes or self.length
        return nodes + (nodes + 1) * (self.length + 1) if self.length else 0

    def drafts(self) -> int:
        """Tokens to draft in the next forward, behind each candidate that has masks."""
        return self.length

    def grown(self, guesses: Guesses) -> list[Tree]:
        """The candidates among the guesses."""
        if self.nodes is None:
            return guesses.chain(self.length)
        return guesses.likeliest(self.nodes)

    def plan(self, trees: list[Tree], drafts: int) -> None:
        """Choose which candidates stay, and which have masks behind them."""
        for tree in trees:
            tree.blocks = list(range(-1, len(tree))) if drafts else []

    def saw(self, trees: list[Tree], accepted: list[int]) -> None:
        """Learn from a forward: how many candidates of each tree were accepted."""


@dataclass(frozen=True)
class Cost:
    """Seconds of a forward for a batch.

    Attributes:
        plain: of one slot in each row, without drafts.
        fixed, slot: of a forward with drafts: for itself, and for each slot of a row.
    """

    plain: float
    fixed: float
    slot: float

    def of(self, slots: float) -> float:
        """With drafts and so many slots in each row."""
        return self.fixed + self.slot * slots


class MeasuredPace(Pace):
    """Numbers by expected acceptance against measured cost.

    Args:
        cost: of a forward of the batch. longest: the most tokens that can be drafted at once.
    """

    def __init__(self, cost: Cost, longest: int):
        super().__init__(longest)
        self.cost, self.longest = cost, longest
        self.depth = min(FIRST, longest)
        self.chance = [*CHANCES[: self.depth]]  # that the likeliest chain is right up to a depth
        self.gain, self.slots = 1.0 + sum(self.chance), 8.0  # tokens and slots of a row's forward
        self.expected, self.actual = 1.0, 1.0  # candidates accepted, to correct the chances
        self.resting = 0  # plain forwards that are left
        self.trying = TRIED

    @property
    def most(self) -> int:
        """The most slots of a forward besides the certain tokens."""
        return MOST + (MOST + 1) * (self.longest + 1)

    @property
    def worth(self) -> float:
        """Tokens of a row that a slot must be expected to add."""
        return self.gain / self.cost.of(self.slots) * self.cost.slot

    def drafts(self) -> int:
        """Tokens to draft in the next forward, behind each candidate that has masks."""
        if self.resting:
            self.resting -= 1
            self.trying = TRIED
            return 0
        if self.trying:
            self.trying -= 1
        elif self.gain / self.cost.of(self.slots) < 1 / self.cost.plain:
            self.resting = RETRY
            return 0
        return self.depth

    def grown(self, guesses: Guesses) -> list[Tree]:
        """The candidates among the guesses."""
        trees = guesses.likeliest(MOST)
        for depth in range(guesses.scores.shape[1]):
            best = [
                max(
                    (c for c, d in zip(t.chances, t.depths, strict=True) if d == depth + 1),
                    default=0.0,
                )
                for t in trees
            ]
            self._follow(depth, sum(best) / len(best))
        return trees

    def plan(self, trees: list[Tree], drafts: int) -> None:
        """Choose which candidates stay, and which have masks behind them."""
        rows, right = len(trees), min(1.5, self.actual / self.expected)
        worth = self.worth
        most = max(map(len, trees))
        nodes = 0
        while nodes < most:
            chance = sum(tree.chances[nodes] for tree in trees if len(tree) > nodes) / rows
            if chance * right <= worth:
                break
            nodes += 1
        for tree in trees:
            tree.cut(nodes)
        if not drafts:
            for tree in trees:
                tree.blocks = []
            return
        value = max(self.gain - 1 - worth * nodes, 0.1)  # of having drafts in the next forward
        ends = [
            sorted(((chance, node - 1) for node, chance in enumerate(tree.ends())), reverse=True)
            for tree in trees
        ]
        blocks = 1
        while blocks <= nodes:
            chance = sum(line[blocks][0] for line in ends if len(line) > blocks) / rows
            if chance * value <= worth * (drafts + 1):
                break
            blocks += 1
        for tree, line in zip(trees, ends, strict=True):
            tree.blocks = [node for _, node in line[:blocks]]
        self.slots += (1 - KEEP) * (1 + nodes + blocks * (drafts + 1) - self.slots)
        self._deepen(blocks)

    def saw(self, trees: list[Tree], accepted: list[int]) -> None:
        """Learn from a forward: how many candidates of each tree were accepted."""
        for tree, count in zip(trees, accepted, strict=True):
            if not len(tree) and not tree.blocks:
                continue
            self.gain += (1 - KEEP) / len(trees) * (1 + count - self.gain)
            if len(tree):
                self.expected = KEEP * self.expected + (1 - KEEP) * sum(tree.chances)
                self.actual = KEEP * self.actual + (1 - KEEP) * count

    def _follow(self, depth: int, chance: float) -> None:
        if depth == len(self.chance):
            self.chance.append(chance)
        self.chance[depth] += (1 - KEEP) * (chance - self.chance[depth])

    def _deepen(self, blocks: int) -> None:
        """Draft as many tokens as are worth their slots behind all candidates with masks."""
        worth, depth = self.worth * (blocks + 1), 0
        while depth < self.longest and self._chance(depth) > worth:
            depth += 1
        self.depth = max(1, depth)

    def _chance(self, depth: int) -> float:
        """That the likeliest chain is right up to a depth (from 0), beyond what was drafted too."""
        if depth < len(self.chance):
            return self.chance[depth]
        last = self.chance[-1]
        before = self.chance[-2] if len(self.chance) > 1 else 1.0
        return last * min(1.0, last / max(before, 1e-9)) ** (depth + 1 - len(self.chance))
