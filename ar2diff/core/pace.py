"""How many candidates a forward of speculation verifies, and behind which of them it drafts.

This file is copied into converted folders: it imports torch and its neighbours alone.
"""

from __future__ import annotations

from .tree import Guesses, Tree


class Pace:
    """Fixed numbers: `length` tokens are drafted behind every candidate.

    Args:
        length: drafts behind a candidate; 0: none.
        nodes: candidates in a tree; None: a chain of `length`.
    """

    def __init__(self, length: int, nodes: int | None = None):
        self.length, self.nodes = length, nodes

    @classmethod
    def without_drafts(cls) -> Pace:
        """Plain AR decoding."""
        return cls(0)

    @property
    def reach(self) -> int:
        """The most positions beyond a row's front that a forward reads."""
        return 2 * self.length + 1 if self.length else 0

    @property
    def most(self) -> int:
        """The most slots of a forward besides the certain tokens."""
        nodes = self.nodes or self.length
        return nodes + (nodes + 1) * (self.length + 1) if self.length else 0

    def drafts(self, rows: int) -> int:
        """Tokens to draft behind each candidate that has masks."""
        return self.length

    def grown(self, guesses: Guesses) -> list[Tree]:
        """The candidates among the guesses."""
        if self.nodes is None:
            return guesses.chain(self.length)
        return guesses.best_first(self.nodes)

    def plan(self, trees: list[Tree], drafts: int) -> None:
        """Choose which candidates have masks behind them."""
        for tree in trees:
            tree.blocks = list(range(-1, len(tree))) if drafts else []
