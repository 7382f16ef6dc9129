"""How many candidates a forward of speculation verifies, which of them have masks behind them, and
how many tokens it drafts.

A forward gets slower with every slot, and how much slower depends on the model, the device and the
batch. So the numbers are chosen while decoding, by what the drafts themselves promise against the
measured cost of a slot (DSpark, 2607.05147, algorithm 1): a candidate is verified, and masks are
put behind it, where the tokens that it promises are worth more than its slots. What is written
never depends on it.
This file is copied into converted folders: it imports torch and its neighbours alone.
"""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import dataclass, replace

from .tree import Guesses, Tree

SIZES = (7, 15, 31, 63)  # candidates of a row that a tree may have
KEEP = 0.95  # of a running mean, at each forward
PRIOR = 2  # forwards that a first timing counts for, in the mean of the first few
TRUST_RATE, MOST_TRUST = 0.05, 3.0
TOO_SLOW = 2.0  # times the expected seconds: the machine did something else
MARGIN = 1.1  # by which a tree must promise to be faster than a chain. It is given up if it is
BRANCHED = 24  # slower by as much after so many forwards, and the next one must promise
WIDER = 1.25  # times as much
LOOK = 64  # forwards between two looks at what branches would be worth
FIRST = 32  # forward of the first look
REST, LONGER = 8, 4  # plain forwards after which drafting is tried again; times as many each time,
TRIED, SPENT = 4, 0.02  # until the forwards for which it is tried cost this share of the rest
LEARNED = 16  # forwards before drafting may rest for the first time: the first timings are rough
RIGHT = (0.7, 0.5, 0.35)  # how often the first drafts are right in a row, before any was verified


class Pace:
    """Fixed numbers: the same tokens are drafted behind every candidate.

    Args:
        length: drafts behind a candidate; 0: none.
        nodes: candidates in a tree; None: a chain of `length`.
    """

    def __init__(self, length: int, nodes: int | None = None):
        self.length, self.nodes = length, nodes

    def of(self, _canvas: object) -> Pace:
        """The pace of any canvas: this one."""
        return self

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

    @property
    def planned(self) -> int:
        """Tokens to draft beside a prompt, or behind one: that of a forward which is no measure of
        what drafts are worth."""
        return self.length

    def asks(self) -> tuple[bool, int, float]:
        """What the next call of `grown` asks of guesses: chains, trees of so many nodes (0: none),
        and the trust in them."""
        return self.nodes is None, self.nodes or 0, 0.0

    def grown(self, guesses: Guesses) -> list[Tree]:
        """The candidates among the guesses."""
        if self.nodes is None:
            return guesses.chain(self.length)
        return guesses.likeliest(self.nodes)

    def plan(self, trees: list[Tree], drafts: int) -> None:
        """Choose which candidates stay, and which have masks behind them."""
        for tree in trees:
            tree.blocks = list(range(-1, len(tree))) if drafts else []

    def saw(self, trees: list[Tree], paths: list[list[int]]) -> None:
        """Learn from a forward: which candidates of each tree were accepted."""

    def took(self, seconds: float, slots: int, drafts: int) -> None:
        """Learn the seconds of a forward with so many slots in each row, of which `drafts` in a
        block."""


class LeanPace(Pace):
    """A chain that is guessed and not verified: masks behind the newest token alone."""

    def plan(self, trees: list[Tree], drafts: int) -> None:
        """Drop the candidates."""
        for tree in trees:
            tree.cut(0)
            tree.blocks = [-1]


def slots_of(nodes: int, drafts: int) -> int:
    """Slots of some candidates, with masks behind each of them and behind the newest token."""
    return nodes + (nodes + 1) * drafts


@dataclass(frozen=True)
class Timing:
    """The seconds of a forward with so many slots in each row, of which `drafts` in a block."""

    slots: int
    drafts: int
    seconds: float


@dataclass(frozen=True)
class Cost:
    """Seconds of a forward for a batch of rows.

    Attributes:
        plain: of one slot in each row, without drafts.
        fixed, slot, draft: of a forward with drafts: for itself, for a slot in each row, and for a
            token that is guessed.
        tree: what a tree costs more than a chain, whatever its size.
    """

    plain: float
    fixed: float
    slot: float
    draft: float = 0.0
    tree: float = 0.0

    @classmethod
    def through(cls, plain: float, few: Timing, many: Timing, lean: Timing) -> Cost:
        """From the seconds of a plain forward, and of three with drafts: `few` of them, `many`, and
        as many in fewer slots."""
        slot = max(0.0, (many.seconds - lean.seconds) / (many.slots - lean.slots))
        more = many.seconds - few.seconds - slot * (many.slots - few.slots)
        draft = max(0.0, more / max(1, many.drafts - few.drafts))
        return cls(
            plain, max(plain, few.seconds - slot * few.slots - draft * few.drafts), slot, draft
        )

    def of(self, slots: float, drafts: int, branches: bool = False) -> float:
        """Seconds of a forward with so many slots in each row."""
        tree = self.tree if branches else 0.0
        return self.fixed + self.slot * slots + self.draft * drafts + tree


class MeasuredPace(Pace):
    """Numbers by the drafts' own confidence and measured acceptance, against measured cost.

    Args:
        cost: of a forward of the batch. longest: the most tokens that can be drafted at once.
    """

    def __init__(self, cost: Cost, longest: int):
        super().__init__(min(len(RIGHT), longest))
        self.cost, self.longest = cost, longest
        self.right = [*RIGHT[:longest]]  # how often drafts are right in a row, up to each depth
        self.guessed = self.length  # drafts that the candidates were made of
        self.trust = 0.0  # added to the log-odds of the best guesses
        # Of a row in a forward with drafts, running means: tokens written, candidates, blocks.
        self.tokens = 1 + sum(self.right)
        self.candidates, self.blocks = float(self.length), float(self.length + 1)
        self.forwards, self.resting, self.trying = 0, 0, LEARNED
        self.rest = REST  # how long drafting rests the next time
        self.margin, self.branched, self.chained = MARGIN, 0, 0.0
        self.counts = {"plain": 0, "fixed": 0, "tree": 0, "tokens": 0}  # of what is averaged

    @property
    def reach(self) -> int:
        """The most positions beyond a row's front that a forward reads."""
        return 2 * self.longest + 1

    @property
    def most(self) -> int:
        """The most slots of a forward besides the certain tokens, and one for each block."""
        return slots_of(SIZES[-1], self.longest + 1)

    @property
    def seconds(self) -> float:
        """Of a token, as drafting goes."""
        slots = 1 + self.candidates + self.blocks * self.length
        return self.cost.of(slots, self.length, self.nodes is not None) / self.tokens

    def drafts(self) -> int:
        """Tokens to draft in the next forward, behind each candidate that has masks."""
        if self.resting:
            self.resting -= 1
            self.trying = TRIED
            return 0
        if self.trying:
            self.trying -= 1
        elif self.seconds > self.cost.plain:
            # Rests are short at first: only in them is a plain forward timed as others are.
            self.resting = self.rest - 1
            self.rest = min(LONGER * self.rest, max(REST, self._longest_rest()))
            self.trying = TRIED
            return 0
        else:
            self.rest = REST
        return self.length

    @property
    def planned(self) -> int:
        """Tokens to draft beside a prompt, or behind one: that of a forward which is no measure of
        what drafts are worth."""
        return 0 if self.resting else self.length

    def _longest_rest(self) -> int:
        """Plain forwards beside which a try costs a small share of time."""
        lost = self.seconds * self.tokens - self.cost.plain  # of a forward with drafts
        return math.ceil(TRIED * lost / (SPENT * self.cost.plain))

    def _rate(self, name: str) -> float:
        """The weight of what is seen now in a running mean: that of a plain mean at first, so that
        a bad start does not last."""
        self.counts[name] += 1
        return max(1 - KEEP, 1 / (self.counts[name] + PRIOR))

    def asks(self) -> tuple[bool, int, float]:
        """What the next call of `grown` asks of guesses: chains, trees of so many nodes (0: none),
        and the trust in them."""
        looks = self._looks
        return looks or self.nodes is None, SIZES[-1] if looks else self.nodes or 0, self.trust

    @property
    def _looks(self) -> bool:
        """Whether the next call of `grown` finds out what branches would be worth."""
        return (self.forwards + 1) % LOOK == FIRST

    def grown(self, guesses: Guesses) -> list[Tree]:
        """The candidates among the guesses."""
        looks = self._looks
        self.forwards += 1
        guesses = replace(guesses, trust=self.trust)
        self.guessed = guesses.scores.shape[1]
        if not looks and self.nodes is not None:
            return guesses.likeliest(self.nodes)
        trees = guesses.chain(self.guessed, self._least())
        if looks:
            bushes = guesses.likeliest(SIZES[-1])
            self._branch(trees, bushes)
            if self.nodes is not None:
                for tree in bushes:
                    tree.cut(self.nodes)
                return bushes
        return trees

    def plan(self, trees: list[Tree], drafts: int) -> None:
        """Choose which candidates stay, and which have masks behind them.

        Without masks where a walk ends, the next forward verifies nothing: it writes one token in
        the time of the few slots that it has.
        """
        lost = self.cost.of(1 + drafts, drafts) - self.seconds
        worth = drafts * self.cost.slot / lost if lost > 0 else 1.0
        least = self._least()
        for tree in trees:
            if len(tree):
                tree.cut(max(1, sum(chance >= least for chance in tree.chances)))
            ends = tree.ends() if drafts else []
            most = max(ends, default=0.0)
            tree.blocks = [n for n, end in enumerate(ends, -1) if end >= min(worth, most)]

    def saw(self, trees: list[Tree], paths: list[list[int]]) -> None:
        """Learn from a forward: which candidates of each tree were accepted."""
        rows = len(trees)
        if not any(len(tree) or tree.blocks for tree in trees):
            return
        seen = (
            1 + sum(map(len, paths)) / rows,
            sum(map(len, trees)) / rows,
            sum(len(tree.blocks) for tree in trees) / rows,
        )
        rate = self._rate("tokens")
        self.tokens, self.candidates, self.blocks = (
            mean + rate * (new - mean)
            for mean, new in zip((self.tokens, self.candidates, self.blocks), seen, strict=True)
        )
        if self.nodes is not None:
            self._unbranch()
        judged = [(t, path) for t, path in zip(trees, paths, strict=True) if len(t)]
        if judged:
            self._calibrate(judged)
            for depth in range(self.guessed):
                if depth == len(self.right):
                    self.right.append(self._right(depth))
                share = sum(len(path) > depth for _, path in judged) / len(judged)
                self.right[depth] += (1 - KEEP) * (share - self.right[depth])
            del self.right[self.guessed :]  # of longer drafts, not made any more, and out of date
            self._deepen()

    def _calibrate(self, judged: list[tuple[Tree, list[int]]]) -> None:
        """Learn how much likelier (or less likely) the best guesses are right than they promise: a
        step of logistic regression on their log-odds."""
        errors = [
            (child in path) - chance for tree, path in judged for child, chance in tree.firsts(path)
        ]
        self.trust += TRUST_RATE * sum(errors) / len(judged)
        self.trust = max(-MOST_TRUST, min(MOST_TRUST, self.trust))

    def took(self, seconds: float, slots: int, drafts: int) -> None:
        """Learn the seconds of a forward with so many slots in each row, of which `drafts` in a
        block. (What a slot costs is not learned: slots hardly change while decoding.)"""
        if slots == 1:
            part, expected = "plain", self.cost.plain
        else:
            branches = self.nodes is not None
            part, expected = "tree" if branches else "fixed", self.cost.of(slots, drafts, branches)
        error = min(seconds, TOO_SLOW * expected) - expected
        more = getattr(self.cost, part) + self._rate(part) * error
        self.cost = replace(self.cost, **{part: max(0.0, more)})

    def _least(self) -> float:
        """The chance of a candidate that is just worth its slot."""
        return self.cost.slot / self.seconds

    def _deepen(self) -> None:
        length = 1
        while length < self.longest and self._speed(length + 1) > self._speed(length):
            length += 1
        self.length = length

    def _speed(self, length: int) -> float:
        """Tokens per second of a row with a chain of drafts."""
        gain = 1 + sum(self._right(depth) for depth in range(length))
        return gain / self.cost.of(1 + length + self.blocks * length, length)

    def _right(self, depth: int) -> float:
        """How often a chain is right up to a depth (from 0), beyond what was drafted too."""
        if depth < len(self.right):
            return self.right[depth]
        last = self.right[-1]
        before = self.right[-2] if len(self.right) > 1 else 1.0
        return last * min(1.0, last / max(before, 1e-9)) ** (depth + 1 - len(self.right))

    def _branch(self, chains: list[Tree], bushes: list[Tree]) -> None:
        """Find out how many candidates a tree should have; a chain is enough if branches promise
        fewer tokens per second."""
        speeds = {size: self._promise(bushes, size) for size in SIZES}
        best = max(SIZES, key=speeds.get)
        nodes = best if speeds[best] > self.margin * self._promise(chains) else None
        if nodes is not None and self.nodes is None:
            self.branched, self.chained = 0, self.seconds
        self.nodes = nodes

    def _unbranch(self) -> None:
        """Return to chains if trees have not kept their promise."""
        self.branched += 1
        if self.branched == BRANCHED and self.seconds > MARGIN * self.chained:
            self.nodes, self.margin = None, WIDER * self.margin

    def _promise(self, trees: list[Tree], nodes: int | None = None) -> float:
        """Tokens per second of a row with chains, or trees of so many candidates, by their own
        chances."""
        trees = deepcopy(trees)
        for tree in trees if nodes is not None else ():
            tree.cut(nodes)
        self.plan(trees, self.length)
        slots = max(1 + len(tree) + len(tree.blocks) * self.length for tree in trees)
        tokens = 1 + sum(sum(tree.chances) for tree in trees) / len(trees)
        return tokens / self.cost.of(slots, self.length, nodes is not None)
