"""Keys and values of each row's clean context, in a stock cache of transformers.

Rows advance on their own: the first `length[r]` columns of row r hold its positions
0 .. length[r] - 1, and the mask hides the columns after them. A forward appends the columns of its
slots; `keep` moves those that became context to their row's place and drops the rest.
This file is copied into converted folders: it imports torch, transformers and its neighbours alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, StaticLayer

from .transfer import upload


class ContextCache:
    """Context of a batch of rows.

    Args:
        model: whose layers' keys are held.
        rows: number of rows.
        static: columns to allocate once (stock `StaticLayer`s, whose shapes never change); None
            lets it grow (`DynamicCache`). Sliding windows are left to the mask.
    """

    def __init__(self, model: Any, rows: int, static: int | None = None):
        if static is None:
            self.stock: Any = DynamicCache()
        else:
            layers = model.config.get_text_config().num_hidden_layers
            self.stock = Cache(layers=[StaticLayer(max_cache_len=static) for _ in range(layers)])
        self.static = static
        self.length = torch.zeros(rows, dtype=torch.long)
        self.width = 0  # columns in use
        self.kept: list[tuple[Any, Tensor, Tensor]] = []

    def columns(self, slots: int) -> int:
        """Number of key columns in a forward pass with this many slots."""
        return self.static if self.static is not None else self.width + slots

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
        self.length = self.length[rows]
        width, self.width = self.width, int(self.length.max())
        self._drop(width - self.width)

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
        for layer in layers if columns else ():
            if self.static is None:
                layer.crop(-columns)
            else:
                layer.cumulative_length.sub_(columns)
        if self.static is None:
            self.kept = [(layer, layer.keys, layer.values) for layer in layers]

    def _layers(self) -> list[Any]:
        return [layer for layer in self.stock.layers if getattr(layer, "is_initialized", False)]


def _devices(layers: list[Any]) -> set[torch.device]:
    """Where a cache lies: a model may be spread over several devices."""
    return {layer.keys.device for layer in layers}
