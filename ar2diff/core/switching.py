"""Reading the rows of a batch for models whose rotary factors depend on the length of a row.

This file is copied into converted folders: it imports torch and its neighbours alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .forward import rope_regime
from .readers import BlockReader, FullReader
from .transfer import upload


class SwitchingReader:
    """Reads rows separately if the model rotates their keys by different factors.

    All keys of a forward get the factors of its longest row, so rows on different sides of a switch
    are not read together; and keys from before a switch are useless after it, so a row that
    crosses it is read again from its start, by a new reader.

    Args:
        make: a reader for some of the rows, [K] int, sorted.
        switches: of `rope_switches`.
        size: tokens that are denoised together.
        length: [R] the rows' length, if a forward covers all of a row; None: up to its block.
    """

    def __init__(
        self,
        make: Callable[[Tensor], BlockReader | FullReader],
        switches: tuple[int, ...],
        size: int,
        length: Tensor | None,
    ):
        self.make, self.switches, self.size, self.length = make, switches, size, length
        self.rows: Tensor | None = None  # [R] numbers by which `make` knows the rows
        self.parts: list[_Part] = []

    def read(self, ids: Tensor, start: Tensor, masked: Tensor) -> Tensor:
        """Logits [N, V] of the masked tokens, in row-major order; arguments as in `BlockReader`."""
        end = start + self.size if self.length is None else self.length
        self._assign(rope_regime(end, self.switches))
        row = masked.nonzero()[:, 0]
        logits: Tensor | None = None
        for part in self.parts:
            here = part.rows
            if not masked[here].any():
                continue
            read = part.reader.read(ids[here, : int(end[here].max())], start[here], masked[here])
            if logits is None:
                logits = read.new_empty(len(row), read.shape[-1])
            (at,) = upload(read.device, torch.isin(row, here).nonzero()[:, 0])
            logits[at] = read
        return logits

    def select(self, rows: Tensor) -> None:
        """Continue with some of the rows."""
        if self.length is not None:
            self.length = self.length[rows]
        if self.rows is not None:
            self.rows = self.rows[rows]
        kept = (part.where(torch.isin(part.rows, rows)) for part in self.parts)
        self.parts = [
            replace(part, rows=torch.searchsorted(rows, part.rows)) for part in kept if part
        ]

    def _assign(self, regime: Tensor) -> None:
        """Give each row a reader of its regime [R]."""
        if self.rows is None:
            self.rows = torch.arange(len(regime))
        kept = (part.where(regime[part.rows] == part.regime) for part in self.parts)
        self.parts = [part for part in kept if part]
        homeless = torch.ones_like(regime, dtype=torch.bool)
        for part in self.parts:
            homeless[part.rows] = False
        for kind in regime[homeless].unique().tolist():
            rows = (homeless & (regime == kind)).nonzero()[:, 0]
            self.parts.append(_Part(rows, kind, self.make(self.rows[rows])))


@dataclass(frozen=True)
class _Part:
    """Rows that are read together: their indices [K] in the batch, sorted, and their reader."""

    rows: Tensor
    regime: int
    reader: BlockReader | FullReader

    def where(self, stay: Tensor) -> _Part | None:
        """Continue with the rows that `stay` [K]; None if there are none."""
        if not stay.any():
            return None
        if not stay.all():
            self.reader.select(stay.nonzero()[:, 0])
        return replace(self, rows=self.rows[stay])
