"""The randomness of modes `ar` and `speculative`: noise that belongs to a position.

A token of distribution p is drawn as argmax(log p + g), where g is Gumbel noise. The noise of a
position depends on the row's key and the position alone, not on the forward in which its token is
drawn. So a text is the same with drafts and without them; and a draft that is chosen by the same
noise is right more often.
This file is copied into converted folders: it imports torch and its neighbours alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .seeds import keyed_generator
from .transfer import upload


class GumbelNoise:
    """Noise by row and position.

    Args:
        generators: of the rows; each gives its row a key. vocabulary: tokens that have noise.
    """

    def __init__(self, generators: Sequence[torch.Generator], vocabulary: int):
        self.keys = [int(torch.randint(2**62, (), generator=g)) for g in generators]
        self.vocabulary = vocabulary
        self.held: list[dict[int, Tensor]] = [{} for _ in generators]

    def at(self, rows: Sequence[int], positions: Sequence[int], device: Any = "cpu") -> Tensor:
        """[N, V] the noise of positions in rows. It is drawn on the CPU, and each position's is
        uploaded once."""
        wanted = [*zip(rows, positions, strict=True)]
        new = [(r, p) for r, p in dict.fromkeys(wanted) if p not in self.held[r]]
        drawn = upload(device, *(self._draw(r, p) for r, p in new)) if new else ()
        for (row, position), noise in zip(new, drawn, strict=True):
            self.held[row][position] = noise
        return torch.stack([self.held[r][p] for r, p in wanted])

    def forget(self, row: int, before: int) -> None:
        """Drop the noise of positions that are decided."""
        self.held[row] = {p: noise for p, noise in self.held[row].items() if p >= before}

    def join(self, other: GumbelNoise) -> None:
        """Take the rows of another noise behind one's own."""
        self.keys, self.held = self.keys + other.keys, self.held + other.held

    def select(self, rows: Sequence[int]) -> None:
        """Continue with some of the rows."""
        self.keys = [self.keys[row] for row in rows]
        self.held = [self.held[row] for row in rows]

    def _draw(self, row: int, position: int) -> Tensor:
        drawn = torch.empty(self.vocabulary)
        drawn.exponential_(generator=keyed_generator(self.keys[row], position))
        return drawn.log_().neg_()
