"""What decodes the rows of a canvas, a forward at each step, and what all modes have in common.

This file is copied into converted folders: it imports torch and its neighbours alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

from .canvas import Canvas
from .samplers import Chooser


class Decoder(ABC):
    """Rows that are decoded together; between two steps, rows can join and leave.

    Attributes:
        canvas: changed in place, until rows join or leave. chooser: with a generator for each row.
    """

    canvas: Canvas
    chooser: Chooser

    def run(self) -> Iterator[Canvas]:
        """Decode, yielding the canvas after every forward."""
        try:
            while self.canvas.unfinished:
                self.step()
                yield self.canvas
        finally:
            self.close()

    @abstractmethod
    def step(self) -> None:
        """Forward all rows once, and decide tokens."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the caches at once: what refers to itself is collected late."""

    def expect(self, other: Any) -> None:
        """Get ready, before the first forward, for the decoder that will take these rows."""
        return None

    def _extend(self, other: Decoder) -> int:
        """Put the rows of another decoder's canvas behind one's own. Returns the number of the
        first."""
        first = len(self.canvas.front)
        self.canvas = self.canvas.joined(other.canvas)
        self.chooser.generators = [*self.chooser.generators, *other.chooser.generators]
        return first

    def _reduce(self, rows: Sequence[int], grid: int = 1) -> None:
        """Keep some rows of the canvas; `grid` as of `Canvas.selected`."""
        self.canvas = self.canvas.selected(rows, grid)
        if self.chooser.generators:
            self.chooser.generators = [self.chooser.generators[row] for row in rows]
