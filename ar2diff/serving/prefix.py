"""Keys and values of beginnings that many prompts share, so that they are read once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..core.seeds import content_key

BLOCK = 16  # tokens that are kept or dropped together

Context = list[tuple[Tensor, Tensor]]  # keys and values [1, heads, tokens, dim], by layer


@dataclass(eq=False)
class _Block:
    """Tokens behind a beginning, and their keys and values [2 * layers, 1, heads, tokens, dim]."""

    ids: tuple[int, ...]
    parent: int
    states: Tensor
    children: list[int] = field(default_factory=list)


class PrefixCache:
    """Blocks of tokens, each known by a hash of all tokens up to its end. The blocks that were used
    last are kept, a beginning at least as long as what follows it.

    Args:
        budget: bytes of keys and values.
        grain: tokens of which a whole number is reused: 1, or the block length of a model whose
            clean tokens read their whole block.

    Attributes:
        used: bytes that are held. hits: tokens that did not have to be read.
    """

    def __init__(self, budget: int, grain: int = 1):
        self.budget, self.grain = budget, grain
        self.size = -(-BLOCK // grain) * grain
        self.blocks: OrderedDict[int, _Block] = OrderedDict()
        self.first: list[int] = []  # blocks that begin a text
        self.used = self.hits = 0

    def get(self, ids: Sequence[int], most: int) -> Context:
        """Keys and values of as many of the first tokens as are known, up to `most`; none if
        there are none."""
        path, count = self._known(ids[:most])
        last, more = self._longest(path, ids[count:most])
        if more:
            path.append(last)
        self._touch(path)
        count += more
        self.hits += count
        if not count:
            return []
        states = torch.cat([self.blocks[key].states for key in path], 3)[:, :, :, :count].unbind()
        return [*zip(states[::2], states[1::2], strict=True)]

    def unknown(self, ids: Sequence[int], most: int) -> int | None:
        """A key of the first whole block of a text, of its first `most` tokens, that is not held;
        None if there is none."""
        path, count = self._known(ids[:most])
        new = tuple(ids[count : min(count + self.size, most)])
        if not self.budget or len(new) < self.size:
            return None
        return _key(path[-1] if path else 0, new)

    def put(self, ids: Sequence[int], context: Context) -> None:
        """Keep the keys and values of a text's first tokens, in whole blocks. Those of a model
        whose layers are not alike, or lie on several devices, are not kept.

        Args:
            context: of all tokens, or of the first ones.
        """
        path, first = self._known(ids[: context[0][0].shape[2]])
        states = [x[:, :, first:] for pair in context for x in pair]
        if len({(x.shape, x.device) for x in states}) > 1:
            return
        count = states[0].shape[2] // self.size
        for place, part in enumerate(_blocks(states, count, self.size)):
            cost = part.numel() * part.element_size()
            if cost * (len(path) + 1) > self.budget:
                break
            start = first + place * self.size
            parent, new = path[-1] if path else 0, tuple(ids[start : start + self.size])
            key = _key(parent, new)
            self.blocks[key] = _Block(new, parent, part)
            self._children(parent).append(key)
            self.used += cost
            path.append(key)
        self._touch(path)
        while self.used > self.budget:
            self._drop(next(iter(self.blocks)))

    def _known(self, ids: Sequence[int]) -> tuple[list[int], int]:
        """The whole blocks with which a text begins, and their number of tokens."""
        path: list[int] = []
        for start in range(0, len(ids) - self.size + 1, self.size):
            new = tuple(ids[start : start + self.size])
            key = _key(path[-1] if path else 0, new)
            block = self.blocks.get(key)
            if block is None or block.ids != new:
                break
            path.append(key)
        return path, len(path) * self.size

    def _longest(self, path: list[int], ids: Sequence[int]) -> tuple[int, int]:
        """The block behind a path that begins as `ids` do for the most tokens, and their number."""
        best = 0, 0
        for key in self._children(path[-1] if path else 0):
            same = 0
            for own, other in zip(self.blocks[key].ids, ids, strict=False):
                if own != other:
                    break
                same += 1
            same -= same % self.grain
            if same > best[1]:
                best = key, same
        return best

    def _children(self, key: int) -> list[int]:
        return self.blocks[key].children if key else self.first

    def _touch(self, path: Sequence[int]) -> None:
        for key in reversed(path):  # what comes before is dropped last
            self.blocks.move_to_end(key)

    def _drop(self, key: int) -> None:
        block = self.blocks.pop(key)
        self._children(block.parent).remove(key)
        self.used -= block.states.numel() * block.states.element_size()


def _key(parent: int, ids: tuple[int, ...]) -> int:
    return content_key([parent - (1 << 63), *ids])


def _blocks(states: list[Tensor], count: int, size: int) -> Iterator[Tensor]:
    """So many blocks of keys and values, each in memory of its own."""
    if count:
        together = torch.stack(states)[:, :, :, : count * size]
        yield from (part.clone() for part in together.split(size, 3))
