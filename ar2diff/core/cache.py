"""Keys and values of each row's clean context, in a stock cache of transformers.

Rows advance on their own: `length[r]` columns of row r, from `begin[r]` on, hold its positions
0 .. length[r] - 1, and the mask hides the columns before and after them. A forward appends the
columns of its slots; `keep` moves those that became context to their row's place and drops the
rest. Prompts of different lengths are left where they were read, so that they end together, and
rows that advance together need no moves.
This file is copied into converted folders: it imports torch, transformers and its neighbours alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary, finalize

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, StaticLayer

from .attention import with_context
from .transfer import upload

# Static caches that no call uses, by rows, columns and whether they can be written outside of
# inference mode: a CUDA graph is tied to the memory that it was captured with, so that the next
# call of a model takes the same.
FREE: WeakKeyDictionary[Any, dict[tuple[int, int, bool], Cache]] = WeakKeyDictionary()
MOST_FREE = 2  # of a model


class ContextCache:
    """Context of a batch of rows.

    Args:
        model: whose layers' keys are held.
        rows: number of rows.
        static: columns to allocate once (stock `StaticLayer`s, whose shapes never change); None
            lets it grow (`DynamicCache`). Sliding windows are left to the mask.
        lent: whether the columns are those of an earlier call, and are left to a later one.
    """

    def __init__(self, model: Any, rows: int, static: int | None = None, lent: bool = False):
        if static is None:
            self.stock: Any = DynamicCache()
        elif lent:
            self.stock = self._lent(model, rows, static)
        else:
            self.stock = _static(model, static)
        self.static = static
        self.begin = torch.zeros(rows, dtype=torch.long)
        self.length = torch.zeros(rows, dtype=torch.long)
        self.width = 0  # columns in use
        self.kept: list[tuple[Any, Tensor, Tensor]] = []
        self._masks: dict[int, Tensor] = {}  # of a static cache, by slots

    def columns(self, slots: int) -> int:
        """Number of key columns in a forward pass with this many slots."""
        return self.static if self.static is not None else self.width + slots

    @property
    def seen(self) -> Tensor:
        """[R, width] bool, which columns hold a token of their row."""
        position = self.position
        return (position >= 0) & (position < self.length[:, None])

    @property
    def position(self) -> Tensor:
        """[R, width] positions of what the columns hold."""
        return torch.arange(self.width) - self.begin[:, None]

    def mask(self, mask: Tensor, seen: Tensor, recurs: bool) -> Tensor:
        """The mask of a forward with a static cache; it is overwritten by the next one that has as
        many slots.

        Args:
            mask, seen: as of `with_context`, `seen` on the host.
            recurs: whether there will be more of as many slots.
        """
        slots = mask.shape[2]
        held = self._masks.get(slots)
        if held is None:
            held = mask.new_empty(len(self.length), 1, slots, self.static)
        if recurs:
            self._masks[slots] = held
        return with_context(mask, *upload(mask.device, seen), held)

    def keep(self, slots: int, first: Tensor, count: Tensor, chosen: Tensor | None = None) -> None:
        """After a forward: slots first[r] .. first[r] + count[r] - 1 become context of row r, or
        the first count[r] of the slots `chosen`.

        Args:
            slots: number of slots in the forward.
            first, count: [R] int. chosen: [R, K] int, from left to right in each row.
        """
        width, most = self.width, int(count.max())
        if not most and self.kept:  # a growing layer made new tensors; the old ones are intact
            for layer, keys, values in self.kept:
                layer.keys, layer.values = keys, values
            return
        if most:
            step = torch.arange(most)
            source = first[:, None] + step if chosen is None else chosen[:, :most]
            kept = step < count[:, None]
            if not width and self.static is None:  # which has columns to spare
                self.begin = source[:, 0].clone()
            end = self.begin + self.length
            if not (~kept | (width + source == end[:, None] + step)).all():
                self._move(slots, source, end[:, None] + step, kept)
            self.length = self.length + count
            self.width = int((end + count).max())
        self._drop(width + slots - self.width)

    def extend(self, slots: int, count: int) -> None:
        """After a forward, where all rows fill the columns: the first `count` of its slots become
        context of every row."""
        self.length, self.width = self.length + count, self.width + count
        self._drop(slots - count)

    def select(self, rows: Tensor) -> None:
        """Continue with some of the rows."""
        layers = self._layers()  # the stock method skips layers that hold nothing yet
        at = {device: upload(device, rows)[0] for device in _devices(layers)}
        self.begin, self.length, self._masks = self.begin[rows], self.length[rows], {}
        unused = 0 if self.static is not None else int(self.begin.min())
        for layer in layers:
            here = at[layer.keys.device]
            layer.keys, layer.values = (x[here, :, unused:] for x in (layer.keys, layer.values))
        self.begin = self.begin - unused
        width, self.width = self.width - unused, int((self.begin + self.length).max())
        self._drop(width - self.width)

    def join(self, other: ContextCache) -> None:
        """Take the rows of another cache, not a static one either, behind one's own. The contexts
        of both end with the last column, so that rows that advance together need no moves."""
        wide = max(self.width, other.width)
        for own in (self, other):
            own.begin = own.begin + (wide - own.width)
        for layer, more in zip(self._layers(), other._layers(), strict=True):
            for name in ("keys", "values"):
                parts = [_padded(getattr(held, name), wide) for held in (layer, more)]
                setattr(layer, name, torch.cat(parts))
        self.begin = torch.cat([self.begin, other.begin])
        self.length = torch.cat([self.length, other.length])
        self.width, self._masks = wide, {}
        self._drop(0)

    def context(self, row: int) -> list[tuple[Tensor, Tensor]]:
        """Keys and values [1, heads, length, dim] of a row's context, by layer, as views."""
        begin = int(self.begin[row])
        place = slice(begin, begin + int(self.length[row]))
        return [
            (layer.keys[row : row + 1, :, place], layer.values[row : row + 1, :, place])
            for layer in self._layers()
        ]

    def fill(self, contexts: Sequence[list[tuple[Tensor, Tensor]]]) -> None:
        """Begin, in a cache that is still empty, with contexts that were read before, one for each
        row; not all are empty."""
        self.length = torch.tensor([c[0][0].shape[2] if c else 0 for c in contexts])
        self.width = int(self.length.max())
        self.begin = self.width - self.length
        (some,) = [context for context in contexts if context][:1]
        for number, pair in enumerate(some):
            states = []
            for kind, held in enumerate(pair):
                rows = [c[number][kind] if c else held[:, :, :0] for c in contexts]
                states.append(torch.cat([_padded(row, self.width) for row in rows]))
            self.stock.update(*states, number)
        self._drop(0)

    def _lent(self, model: Any, rows: int, static: int) -> Cache:
        free, key = FREE.setdefault(model, {}), (rows, static, torch.is_inference_mode_enabled())
        stock = free.pop(key, None)
        if stock is None:
            stock = _static(model, static)
        else:
            stock.reset()
        finalize(self, _give_back, free, key, stock).atexit = False
        return stock

    def _move(self, slots: int, source: Tensor, target: Tensor, kept: Tensor) -> None:
        """Move slots to columns, both [R, K], where `kept`."""
        spare = self.width + slots - 1  # rows that keep fewer write this column onto itself
        source = torch.where(kept, self.width + source, spare)
        target = torch.where(kept, target, spare)
        # A target may be another slot's source, so all are read before any is written; `spare` is
        # a source only for the row that it belongs to, where it is its own target or comes last.
        places: dict[Any, list[Tensor]] = {}
        for layer in self._layers():
            for states in (layer.keys, layer.values):
                key = states.device, *states.shape[1:3]
                if key not in places:
                    places[key] = upload(
                        states.device, *(_flat(x, *key[1:]) for x in (source, target))
                    )
                at, to = places[key]
                # Rows of one matrix, which takes a third of the time of gather and scatter.
                flat = states.view(-1, states.shape[3])
                flat.index_copy_(0, to, flat.index_select(0, at))

    def _drop(self, columns: int) -> None:
        layers = self._layers()
        if self.static is not None:
            if columns and layers:
                torch._foreach_sub_([layer.cumulative_length for layer in layers], columns)
            return
        for layer in layers if columns else ():
            layer.crop(-columns)
        self.kept = [(layer, layer.keys, layer.values) for layer in layers]

    def _layers(self) -> list[Any]:
        return [layer for layer in self.stock.layers if getattr(layer, "is_initialized", False)]


def _padded(states: Tensor, width: int) -> Tensor:
    """Keys or values with empty columns before them, `width` in all."""
    return torch.nn.functional.pad(states, (0, 0, width - states.shape[2], 0))


def _flat(columns: Tensor, heads: int, width: int) -> Tensor:
    """[R * heads * K] where columns [R, K] stand in the flattened [R, heads, width] of a layer."""
    block = torch.arange(len(columns) * heads).view(-1, heads, 1) * width
    return (block + columns[:, None]).flatten()


def _static(model: Any, columns: int) -> Cache:
    layers = model.config.get_text_config().num_hidden_layers
    return Cache(layers=[StaticLayer(max_cache_len=columns) for _ in range(layers)])


def _give_back(
    free: dict[tuple[int, int, bool], Cache], key: tuple[int, int, bool], stock: Cache
) -> None:
    while len(free) >= MOST_FREE:
        del free[next(iter(free))]
    free[key] = stock


def _devices(layers: list[Any]) -> set[torch.device]:
    """Where a cache lies: a model may be spread over several devices."""
    return {layer.keys.device for layer in layers}
