"""How many candidates a forward of speculation verifies, and how many tokens it drafts.

A forward gets slower with every slot, and how much slower depends on the model, the device and the
batch. So the numbers are chosen while decoding, by acceptance against cost, both of them measured:
one more draft, or one more branch, is added as long as the tokens per second that it promises grow,
up to the first that does not (DSpark, 2607.05147, algorithm 1). What is written never depends on
it.
This file is copied into converted folders: it imports torch and its neighbours alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from .tree import Guesses, Tree

MOST = 64  # candidates of a row
KEEP = 0.95  # of a running mean, at each forward
MARGIN = 1.1  # by which a tree must promise to be faster than a chain
LOOK = 64  # forwards between two looks at what branches would be worth
FIRST = 8  # forward of the first look
RETRY = 128  # plain forwards after which drafting is tried again, and
TRIED = 3  # for how many forwards
RIGHT = (0.7, 0.5, 0.35)  # how often the first drafts are right in a row, before any was verified


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
        """The most slots of a forward besides the certain tokens, and one for each block."""
        return slots_of(self.nodes or self.length, self.length + 1) if self.length else 0

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


def slots_of(nodes: int, drafts: int) -> int:
    """Slots of some candidates, with masks behind each of them and behind the newest token."""
    return nodes + (nodes + 1) * drafts


@dataclass(frozen=True)
class Cost:
    """Seconds of a forward for a batch of rows.

    Attributes:
        plain: of one slot in each row, without drafts.
        fixed, slot: of a forward with drafts: for itself, and for a slot in each row.
        tree: what a tree costs more than a chain, whatever its size.
    """

    plain: float
    fixed: float
    slot: float
    tree: float = 0.0

    @classmethod
    def through(cls, plain: float, few: tuple[int, float], many: tuple[int, float]) -> Cost:
        """From the seconds of a plain forward, and (slots, seconds) of two with drafts."""
        slot = max(0.0, (many[1] - few[1]) / (many[0] - few[0]))
        return cls(plain, max(plain, few[1] - slot * few[0]), slot)

    def of(self, nodes: int, drafts: int) -> float:
        """Seconds with so many candidates, and masks behind each of them; more candidates than
        drafts are a tree."""
        tree = self.tree if nodes > drafts else 0.0
        return self.fixed + self.slot * (1 + slots_of(nodes, drafts)) + tree


class MeasuredPace(Pace):
    """Numbers by measured acceptance against measured cost.

    Args:
        cost: of a forward of the batch. longest: the most tokens that can be drafted at once.
    """

    def __init__(self, cost: Cost, longest: int):
        super().__init__(min(len(RIGHT), longest))
        self.cost, self.longest = cost, longest
        self.right = [*RIGHT[:longest]]  # how often drafts are right in a row, up to each depth
        self.forwards, self.resting, self.trying = 0, 0, TRIED

    @property
    def reach(self) -> int:
        """The most positions beyond a row's front that a forward reads."""
        return 2 * self.longest + 1

    @property
    def most(self) -> int:
        """The most slots of a forward besides the certain tokens, and one for each block."""
        return slots_of(MOST, self.longest + 1)

    def drafts(self) -> int:
        """Tokens to draft in the next forward, behind each candidate that has masks."""
        if self.resting:
            self.resting -= 1
            self.trying = TRIED
            return 0
        if self.trying:
            self.trying -= 1
        elif self._speed(self.length) < 1 / self.cost.plain:
            self.resting = RETRY
            return 0
        return self.length

    def grown(self, guesses: Guesses) -> list[Tree]:
        """The candidates among the guesses."""
        self.forwards += 1
        length = guesses.scores.shape[1]
        looks = self.forwards % LOOK == FIRST
        if self.nodes is None and not looks:
            return guesses.chain(length)
        trees = guesses.likeliest(MOST if looks else self.nodes)
        if looks:
            self._branch(trees, length)
            if self.nodes is None:
                return guesses.chain(length)
            for tree in trees:
                tree.cut(self.nodes)
        return trees

    def saw(self, trees: list[Tree], accepted: list[int]) -> None:
        """Learn from a forward: how many candidates of each tree were accepted."""
        deepest = [max(tree.depths, default=0) for tree in trees]
        for depth in range(max(deepest, default=0)):
            reached = [n > depth for n, most in zip(accepted, deepest, strict=True) if most > depth]
            if depth == len(self.right):
                self.right.append(self._right(depth))
            self.right[depth] += (1 - KEEP) * (sum(reached) / len(reached) - self.right[depth])
        if any(deepest):
            self._deepen()

    def _deepen(self) -> None:
        length = 1
        while length < self.longest and self._speed(length + 1) > self._speed(length):
            length += 1
        self.length = length

    def _speed(self, length: int) -> float:
        """Tokens per second of a row with a chain of drafts."""
        gain = 1 + sum(self._right(depth) for depth in range(length))
        return gain / self.cost.of(length, length)

    def _right(self, depth: int) -> float:
        """How often a chain is right up to a depth (from 0), beyond what was drafted too."""
        if depth < len(self.right):
            return self.right[depth]
        last = self.right[-1]
        before = self.right[-2] if len(self.right) > 1 else 1.0
        return last * min(1.0, last / max(before, 1e-9)) ** (depth + 1 - len(self.right))

    def _branch(self, trees: list[Tree], length: int) -> None:
        """Find out how many candidates a tree should have; a chain is enough if branches promise
        fewer tokens per second."""
        most = max(map(len, trees))
        chances = [
            sum(tree.chances[n] for tree in trees if len(tree) > n) / len(trees)
            for n in range(most)
        ]
        deepest = [
            max((c for c, d in zip(t.chances, t.depths, strict=True) if d == depth), default=0.0)
            for depth in range(1, length + 1)
            for t in trees
        ]
        chain = (1 + sum(deepest) / len(trees)) / self.cost.of(length, length)
        gain, before, self.nodes = 1 + sum(chances[:length]), 0.0, None
        for nodes in range(length + 1, most + 1):  # up to the first that adds too little
            gain += chances[nodes - 1]
            speed = gain / self.cost.of(nodes, length)
            if speed < before:
                break
            before = speed
            if speed > MARGIN * chain:
                self.nodes = nodes
