"""Keys and values of each row's clean context, in a stock cache of transformers.

Rows advance on their own: the first `length[r]` columns of row r hold its positions
0 .. length[r] - 1, and the mask hides the columns after them. A forward appends the columns of its
slots; `keep` moves those that became context to their row's place and drops the rest.
This file is copied into converted folders: it imports torch, transformers and its neighbours alone.
"""

from __future__ import annotations

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
        self.length = torch.zeros(rows, dtype=torch.long)
        self.width = 0  # columns in use
        self.kept: list[tuple[Any, Tensor, Tensor]] = []
        self._masks: dict[int, Tensor] = {}  # of a static cache, by slots

    def columns(self, slots: int) -> int:
        """Number of key columns in a forward pass with this many slots."""
        return self.static if self.static is not None else self.width + slots

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
            in_place = (self.length == width) & (source == step).all(1) & (count == most)
            if not in_place.all():
                self._move(slots, source, count)
            self.length = self.length + count
            self.width = int(self.length.max())
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
        for layer in layers:
            here = at[layer.keys.device]
            layer.keys, layer.values = layer.keys[here], layer.values[here]
        self.length, self._masks = self.length[rows], {}
        width, self.width = self.width, int(self.length.max())
        self._drop(width - self.width)

    def _lent(self, model: Any, rows: int, static: int) -> Cache:
        free, key = FREE.setdefault(model, {}), (rows, static, torch.is_inference_mode_enabled())
        stock = free.pop(key, None)
        if stock is None:
            stock = _static(model, static)
        else:
            stock.reset()
        finalize(self, _give_back, free, key, stock).atexit = False
        return stock

    def _move(self, slots: int, source: Tensor, count: Tensor) -> None:
        step = torch.arange(source.shape[1])
        kept = step < count[:, None]
        spare = self.width + slots - 1  # rows that keep fewer write this column onto itself
        source = torch.where(kept, self.width + source, spare)
        target = torch.where(kept, self.length[:, None] + step, spare)
        # A target may be another slot's source, so all are read before any is written; `spare` is
        # a source only for the row that it belongs to, where it is its own target or comes last.
        layers = self._layers()
        places = {device: upload(device, source, target) for device in _devices(layers)}
        for layer in layers:
            at, to = (place[:, None, :, None] for place in places[layer.keys.device])
            for states in (layer.keys, layer.values):
                size = (-1, states.shape[1], -1, states.shape[3])
                states.scatter_(2, to.expand(*size), states.gather(2, at.expand(*size)))

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
