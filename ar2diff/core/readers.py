"""From a canvas to logits: which slots each step forwards, and which a cache holds.

`BlockReader` serves `block_causal` and `causal_context`. Each of its forwards holds
[pending | block]: the clean tokens that are not cached yet (a prompt, or a finished block, which is
committed together with the first step of the next one) and the noisy block. It is exact.
`FullReader` serves `full`, where caches are approximate (Fast-dLLM, Wu et al. 2025): `prefix` keeps
the keys before the block, `dual` also those after it, as they were when the block was begun.
This file is copied into converted folders: it imports torch and its neighbours alone.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .attention import (
    PADDING,
    Slots,
    layer_windows,
    model_mask,
    reading_slot,
    with_context,
)
from .cache import ContextCache
from .compiled import compiled, rounded
from .forward import logits_at
from .sight import wide
from .spec import Spec
from .transfer import upload

ALL = 1 << 30  # more slots than any tree has
MASKS = 64  # masks that are remembered; a single row needs two


@dataclass(frozen=True)
class _StepSlots:
    """The slots of a step, [pending | block]; they are the same for all steps of a block.

    Attributes:
        start: [R] first position of each row's block.
        pending: [R] clean tokens before it that are not cached.
        ahead: [R] clean tokens after those, which they read: the rest of an image.
        pos: [R, S] positions of the slots.
        mask: which of context and slots each slot reads.
        index: [R, W] slot, counted over the rows, at which each token of the block is read.
        crossing: [C] slots of the last pending tokens, where `shift` reads the first token of a
            block, of the rows with `pending > 0`.
        first: [R, W] bool, tokens that are read across the boundary of the block.
    """

    start: Tensor
    pending: Tensor
    ahead: Tensor
    pos: Tensor
    mask: Any
    index: Tensor
    crossing: Tensor
    first: Tensor


class BlockReader:
    """Logits of noisy blocks, each after its own row's clean context.

    Args:
        columns: how many a static cache has.
        size: tokens that are denoised together (at most the trained block length).
        grid: block length, which divides it.
        cache: `dynamic`, `static`, or `none`: the context is read again at each step.
        fast: whether the forwards of fixed shape are compiled; the cache is static then.
        until: [R, P] the last position that each token of the prompts reads; None: its own.
    """

    def __init__(
        self,
        model: Any,
        spec: Spec,
        rows: int,
        columns: int,
        size: int,
        grid: int,
        cache: str,
        fast: bool = False,
        until: Tensor | None = None,
    ):
        self.model, self.spec, self.size, self.fast = model, spec, size, fast
        self.grid, self.until = grid, until
        static = (rounded(columns) if fast else columns) if cache == "static" else None
        self.cache = None if cache == "none" else ContextCache(model, rows, static, lent=fast)
        self.rows = rows
        self.boundary: Tensor | None = None  # [R, V] shift: logits of the context's last position
        self._layout: _StepSlots | None = None
        self._masks: dict[tuple[int, ...], Tensor] = {}  # by pending tokens
        windows = layer_windows(model.config.get_text_config(), spec.local_window)
        self.alike = not any(windows.values())  # all slots read the context

    def read(self, ids: Tensor, start: Tensor, masked: Tensor) -> Tensor:
        """Logits [N, V] of the masked tokens, in row-major order.

        Args:
            ids: [R, T] canvas. start: [R] first position of each row's block.
            masked: [R, size] bool, the tokens wanted.
        """
        if self._layout is None or not torch.equal(self._layout.start, start):
            self._layout = self._lay_out(start)
        layout, device = self._layout, self.model.device
        index = layout.index[masked]
        if len(layout.crossing):
            index = torch.cat([index, layout.crossing])
        index, tokens, pos, *across = upload(
            device, index, ids.gather(1, layout.pos), layout.pos, *self._boundaries(layout, masked)
        )
        slots = layout.pos.shape[1]
        # A block alone, or behind the one before it; the first forward reads the prompt.
        steady = self.fast and self.cache.width and slots in (self.size, 2 * self.size)
        with compiled(self.model) if steady else nullcontext():
            logits = logits_at(
                self.model,
                index,
                cache=self.cache.stock if self.cache else None,
                input_ids=tokens,
                attention_mask=layout.mask,
                position_ids=pos,
            )
        if self.cache:
            first = slots - self.size - layout.ahead - layout.pending
            self.cache.keep(slots, first, layout.pending)
            if slots > self.size:
                self._layout = None
        return self._across(logits, *across) if across else logits

    def select(self, rows: Tensor) -> None:
        """Continue with some of the rows."""
        self.rows = len(rows)
        if self.until is not None:
            self.until = self.until[rows]
        if self.cache:
            self.cache.select(rows)
        if self.boundary is not None:
            self.boundary = self.boundary[upload(self.boundary.device, rows)[0]]
        self._layout = None

    def join(self, other: BlockReader) -> None:
        """Take the rows of another reader behind one's own; both have read before, and neither has
        a static cache."""
        if self.boundary is not None:
            self.boundary = torch.cat([self.boundary, other.boundary])
        if self.cache:
            self.cache.join(other.cache)
        self.until = until_joined(self.until, other.until)
        self.rows, self.size = self.rows + other.rows, max(self.size, other.size)
        self.grid = max(self.grid, other.grid)
        self._layout = None
        self._masks.clear()

    def _boundaries(self, layout: _StepSlots, masked: Tensor) -> tuple[Tensor, ...]:
        """Of a forward, for `_across`: the rows whose context ends in it, the rows whose first
        token is wanted, and which of the wanted tokens these are."""
        if self.spec.prediction != "shift":
            return ()
        rows = masked[:, 0] & layout.first[:, 0]
        wanted = layout.first[masked]
        return tuple(x.nonzero()[:, 0] for x in (layout.pending > 0, rows, wanted))

    def _across(self, logits: Tensor, ending: Tensor, rows: Tensor, wanted: Tensor) -> Tensor:
        """The first token of a block is read at the context's last position, which was or is being
        cached: its logits are kept for as long as the block lasts."""
        if self.boundary is None:
            self.boundary = logits.new_zeros(self.rows, logits.shape[-1])
        count = len(logits) - len(ending)
        if len(ending):
            self.boundary[ending] = logits[count:]
        logits = logits[:count]
        if len(rows):
            logits[wanted] = self.boundary[rows]
        return logits

    def _lay_out(self, start: Tensor) -> _StepSlots:
        length = self.cache.length if self.cache else torch.zeros_like(start)
        pending, ahead = start - length, self._ahead(start, length)
        clean = int((pending + ahead).max())
        slots, place = clean + self.size, torch.arange(self.size)
        pos = torch.cat(
            [(start + ahead)[:, None] + torch.arange(-clean, 0), start[:, None] + place], 1
        )
        own = (place + clean).expand(len(start), -1)
        index = reading_slot(
            start[:, None] + place, self.spec.attention, self.size, self.spec.prediction, own,
            own - ahead[:, None],
        )  # fmt: skip
        index = index + torch.arange(len(start))[:, None] * slots
        crosses = self.spec.prediction == "shift"
        return _StepSlots(
            start=start.clone(),
            pending=pending,
            ahead=ahead,
            pos=pos.clamp(min=0),
            mask=self._mask(start, length, pending, pos),
            index=index,
            crossing=index[pending > 0, 0] if crosses else pending[:0],
            first=(place == 0) & (start > 0)[:, None],
        )

    def _ahead(self, start: Tensor, length: Tensor) -> Tensor:
        """[R] how many tokens beyond the start of a block the pending ones read: the rest of an
        image that the block cuts through."""
        if self.until is None:
            return torch.zeros_like(start)
        place = torch.arange(self.until.shape[1])
        pending = (place >= length[:, None]) & (place < start[:, None])
        return (torch.where(pending, self.until + 1, 0).amax(1) - start).clamp(min=0)

    def _mask(self, start: Tensor, length: Tensor, pending: Tensor, pos: Tensor) -> Any:
        """The mask of the slots. If all slots read the whole context, their own part of it is built
        once for all blocks with as many pending tokens."""
        slots = pos.shape[1]
        seen = self.cache.seen if self.cache else torch.zeros(len(pos), 0, dtype=torch.bool)
        noisy = (torch.arange(slots) >= slots - self.size).expand_as(pos)
        until = None if self.until is None else torch.where(noisy, pos, until_at(self.until, pos))
        key = tuple(pending.tolist())
        kept = self.alike and (until is None or torch.equal(until, pos))
        if kept and key in self._masks:
            return self._after_context(self._masks[key], seen)
        columns = 0 if self.alike else seen.shape[1]
        cached = self.cache.position if columns else pos[:, :0]
        # Blocks that are read together may begin anywhere on the grid.
        own = torch.where(noisy, start[:, None], pos // self.grid * self.grid)
        layout = slots_of(
            columns + slots if self.alike or not self.cache else self.cache.columns(slots),
            seen[:, :columns],
            cached,
            noisy | (pos >= length[:, None]),
            pos,
            noisy,
            self.model.device,
            own if self.grid < self.size else None,
            until=until,
        )
        mask = model_mask(
            self.model, layout, self.spec.attention, self.grid, self.spec.local_window,
            queries=range(columns, columns + slots),
        )  # fmt: skip
        if not self.alike:
            return mask
        if not kept:
            return self._after_context(mask, seen)
        if len(self._masks) > MASKS:
            self._masks.clear()
        self._masks[key] = mask
        return self._after_context(mask, seen)

    def _after_context(self, mask: Tensor, seen: Tensor) -> Tensor:
        """The mask of the slots that follow the columns `seen` [R, C] of the context."""
        if self.cache and self.cache.static is not None:
            return self.cache.mask(mask, seen, recurs=mask.shape[2] <= 2 * self.size)
        return with_context(mask, *upload(self.model.device, seen))


class FullReader:
    """Logits of a window of rows in which everything reads everything.

    Args:
        size: tokens denoised together.
        cache: `none`; `prefix` or `dual`, approximations.
    """

    def __init__(self, model: Any, spec: Spec, length: Tensor, size: int, cache: str):
        self.model, self.spec, self.length, self.size, self.kind = model, spec, length, size, cache
        self.cache: ContextCache | None = None
        self.since: Tensor | None = None  # [R] `start` at which the cache was filled

    def read(self, ids: Tensor, start: Tensor, masked: Tensor) -> Tensor:
        """Logits [N, V] of the masked tokens, in row-major order; arguments as in `BlockReader`."""
        rows, total = ids.shape
        row, place = masked.nonzero(as_tuple=True)
        wanted = self._slot(start[row] + place)
        position = torch.arange(total).expand(rows, -1)
        fresh = self.since is None or not torch.equal(self.since, start)
        if self.kind == "none" or fresh:
            self.cache = None if self.kind == "none" else ContextCache(self.model, rows)
            self.since = start.clone()
            real = position < self.length[:, None]
            logits = self._forward(ids, position, real, position[:, :0], real[:, :0], row, wanted)
            if self.cache:
                self.cache.keep(total, torch.zeros(rows).long(), torch.full((rows,), total))
            return logits
        first = self._slot(start)
        end = start + self.size if self.kind == "dual" else self.length
        end = torch.minimum(end, self.length)
        pos = first[:, None] + torch.arange(int((end - first).max()))
        seen = (position < first[:, None]) | (position >= end[:, None])
        seen &= position < self.length[:, None]
        logits = self._forward(
            ids, pos, pos < end[:, None], position, seen, row, wanted - first[row]
        )
        none = torch.zeros(rows).long()
        self.cache.keep(pos.shape[1], none, none)
        return logits

    def select(self, rows: Tensor) -> None:
        """Continue with some of the rows."""
        self.length = self.length[rows]
        if self.cache:
            self.cache.select(rows)
            self.since = self.since[rows]

    def join(self, other: FullReader) -> None:
        """Take the rows of another reader behind one's own; neither has a cache."""
        self.length = torch.cat([self.length, other.length])
        self.size = max(self.size, other.size)

    def _slot(self, position: Tensor) -> Tensor:
        """Position at which the tokens of positions [N] are read."""
        return reading_slot(position, "full", None, self.spec.prediction, position)

    def _forward(
        self,
        ids: Tensor,
        pos: Tensor,
        real: Tensor,
        cached: Tensor,
        seen: Tensor,
        row: Tensor,
        slot: Tensor,
    ) -> Tensor:
        """Logits at slots `slot` of rows `row`: of a forward of positions `pos` (where `real`)
        that reads the columns `cached` (where `seen`)."""
        slots, width, device = pos.shape[1], cached.shape[1], self.model.device
        noisy = torch.ones_like(real)
        layout = slots_of(width + slots, seen, cached, real, pos, noisy, device)
        queries = range(width, width + slots)
        mask = model_mask(self.model, layout, "full", None, self.spec.local_window, queries=queries)
        pos = pos.clamp(max=ids.shape[1] - 1)
        index, tokens, pos = upload(device, row * slots + slot, ids.gather(1, pos), pos)
        return logits_at(
            self.model,
            index,
            cache=self.cache.stock if self.cache else None,
            input_ids=tokens,
            attention_mask=mask,
            position_ids=pos,
        )


def slots_of(
    columns: int,
    seen: Tensor,
    cached: Tensor,
    real: Tensor,
    pos: Tensor,
    noisy: Tensor,
    device: Any,
    start: Tensor | None = None,
    branch: tuple[Tensor, Tensor, Tensor] | None = None,
    until: Tensor | None = None,
) -> Slots:
    """Slots [R, columns] of a step: the cached columns, then those forwarded, then empty ones.

    Args:
        seen, cached: [R, C] whether a cached column holds a token of its row, and its position.
        real, pos, noisy, start: [R, S] of the slots forwarded.
        branch: [R, S] `enter`, `leave` and `block` of the slots forwarded, if candidates branch.
        until: [R, S] of the slots forwarded; None: each one's own position.
    """
    rows, rest = len(pos), columns - cached.shape[1] - pos.shape[1]

    def join(first: Tensor, second: Tensor, fill: int) -> Tensor:
        parts = [first.to(second.dtype), second] if first.shape[1] else [second]
        if rest:
            parts.append(torch.full((rows, rest), fill, dtype=second.dtype))
        return torch.cat(parts, 1) if len(parts) > 1 else second

    doc = join(torch.where(seen, 0, PADDING), torch.where(real, 0, PADDING), PADDING)
    clean = torch.zeros_like(seen)
    found = {"doc": doc, "pos": join(cached, pos, 0), "noisy": join(clean, noisy, 0)}
    if start is not None:
        found["start"] = join(cached, start, 0)
    if until is not None:
        found["until"] = join(cached, until, 0)
    if branch is not None:  # what is cached is before all branches
        found["enter"] = join(torch.zeros_like(cached), branch[0], 0)
        found["leave"] = join(torch.full_like(cached, ALL), branch[1], 0)
        found["block"] = join(torch.zeros_like(cached), branch[2], 0)
    return Slots(**dict(zip(found, upload(device, *found.values()), strict=True)))


def until_at(until: Tensor, pos: Tensor) -> Tensor:
    """[R, S] how far the tokens at positions [R, S] read, from [R, P]: those behind, up to
    themselves."""
    known = pos.clamp(0, until.shape[1] - 1)
    return torch.where(pos == known, until.gather(1, known), pos)


def until_joined(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    """How far the tokens of the rows of two readers read."""
    if first is None:
        return None
    width = max(first.shape[1], second.shape[1])
    return torch.cat([wide(first, width), wide(second, width)])
