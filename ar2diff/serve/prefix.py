"""Keys and values of beginnings that many prompts share, so that they are read once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..core.seeds import content_key

BLOCK = 16  # tokens that are kept or dropped together

Context = list[tuple[Tensor, Tensor]]  # keys and values [1, heads, tokens, dim], by layer


@dataclass(eq=False)
class _Block:
    """Tokens behind a beginning, and their keys and values."""

    ids: tuple[int, ...]
    parent: int
    context: Context
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
        parts = [(self.blocks[key].context, self.size) for key in path]
        last, more = self._longest(path, ids[count:most])
        if more:
            path.append(last)
            parts.append((self.blocks[last].context, more))
        self._touch(path)
        count += more
        self.hits += count
        if not count:
            return []
        return [
            tuple(
                torch.cat([part[layer][kind][:, :, :size] for part, size in parts], 2)
                for kind in (0, 1)
            )
            for layer in range(len(parts[0][0]))
        ]

    def put(self, ids: Sequence[int], context: Context) -> None:
        """Keep the keys and values of the first tokens of a text, in whole blocks.

        Args:
            context: of as many tokens as it has.
        """
        have = min(len(ids), context[0][0].shape[2]) if context else 0
        path, count = self._known(ids[:have])
        while count + self.size <= have:
            place = slice(count, count + self.size)
            held = [(k[:, :, place].clone(), v[:, :, place].clone()) for k, v in context]
            cost = _bytes(held)
            if cost * (len(path) + 1) > self.budget:
                break
            parent, new = path[-1] if path else 0, tuple(ids[place])
            key = _key(parent, new)
            self.blocks[key] = _Block(new, parent, held)
            self._children(parent).append(key)
            self.used += cost
            path.append(key)
            count += self.size
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
        self.used -= _bytes(block.context)


def _key(parent: int, ids: tuple[int, ...]) -> int:
    return content_key([parent - (1 << 63), *ids])


def _bytes(context: Context) -> int:
    return sum(x.numel() * x.element_size() for pair in context for x in pair)
