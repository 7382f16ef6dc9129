"""The noise draws of a likelihood estimate: which tokens of a row are masked, and what each of them
counts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from ..core.seeds import content_key, keyed_generator
from .noise import draw_times


@dataclass(frozen=True)
class Draws:
    """Masks of one row of L tokens in K blocks.

    Attributes:
        masked: [D, L] bool. weight: [D, L] double, what the -log p of a masked token counts: the
            sum over all draws is an unbiased estimate of the bound.
        random: [K] bool, blocks whose masks were drawn; the others are enumerated.
    """

    masked: Tensor
    weight: Tensor
    random: Tensor

    def sums(self, values: Tensor, samples: int) -> tuple[Tensor, Tensor]:
        """The sum over the enumerated blocks of weighted values, [D, L], and, for blocks that were
        drawn, what each draw estimates, [samples, K]; 0 for the others."""
        blocks = torch.zeros(len(values), len(self.random), dtype=torch.double)
        size = -(-values.shape[1] // len(self.random))
        blocks.index_add_(1, torch.arange(values.shape[1]) // size, self.weight * values)
        drawn = torch.zeros(samples, len(self.random), dtype=torch.double)
        if self.random.any():
            drawn = blocks[:samples] * self.random * samples
        return blocks[:, ~self.random].sum(), drawn


def draw(
    row: Sequence[int], block_length: int | None, maskable: Tensor, samples: int, seed: int,
    start: int,
) -> Draws:  # fmt: skip
    """The masks of a row: `samples` for each block, stratified in their number of masked tokens,
    or all there are if those are no more.

    Args:
        maskable: [L] bool, none of them before `start`.
        seed: the draws depend on it and on the row, or on what stands before a start above 1.
    """
    size = block_length or len(row)
    key = content_key(row[:start] if start > 1 else row)
    firsts = range(0, len(row), size)
    blocks = [maskable[first : first + size].nonzero()[:, 0] + first for first in firsts]
    begun = start // size  # continuations of one context share the draws of their common blocks
    times = draw_times(samples, len(blocks) - begun, keyed_generator(seed, key, 1))
    order = torch.rand(len(row) - start, samples, generator=keyed_generator(seed, key, 2)).T
    subsets = [subsets_of(len(places), samples) for places in blocks]
    random = torch.tensor([bool(len(p)) and not s for p, s in zip(blocks, subsets, strict=True)])
    copies = max(1, samples if random.any() else 0, *map(len, subsets))
    masked = torch.zeros(copies, len(row), dtype=torch.bool)
    weight = torch.zeros(copies, len(row), dtype=torch.double)
    for b, (places, chosen) in enumerate(zip(blocks, subsets, strict=True)):
        n = len(places)
        if random[b]:
            k = (times[:, b - begun].sort().values * n).ceil().long().clamp(1, n)
            rank = order[:, places - start].argsort(1).argsort(1)
            masked[:samples, places] = rank < k[:, None]
            weight[:samples, places] = (n / (k.double() * samples))[:, None]
        for d, subset in enumerate(chosen):
            masked[d, places[list(subset)]] = True
            weight[d, places] = 1 / (len(subset) * math.comb(n, len(subset)))
    return Draws(masked, weight, random)


def subsets_of(n: int, most: int) -> list[tuple[int, ...]]:
    """All subsets of n tokens but the empty one; none of them if they are more than `most`, which a
    single token never is."""
    if n > 1 and (n > most or 2**n - 1 > most):
        return []
    return [subset for k in range(1, n + 1) for subset in combinations(range(n), k)]
