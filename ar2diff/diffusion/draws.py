"""The noise draws of a likelihood estimate: what a row shows in each, which of its tokens are
scored, and what each of them counts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from ..core.noise import Noise
from ..core.seeds import content_key, keyed_generator
from .corruption import bound_times, draw_times


@dataclass(frozen=True)
class Draws:
    """Noisy copies of one row of L tokens in K blocks.

    Attributes:
        xt: [D, L] ids.
        masked: [D, L] bool, the open slots. weight: [D, L] double, what the cost of the token there
            counts: the sum over all draws is an unbiased estimate of the bound.
        random: [K] bool, blocks whose noise was drawn; the others are enumerated.
        size: of a block, in tokens.
        t: [D, L] double, the times of a free noise; else None.
    """

    xt: Tensor
    masked: Tensor
    weight: Tensor
    random: Tensor
    size: int
    t: Tensor | None = None

    def sums(self, values: Tensor, samples: int) -> tuple[Tensor, Tensor]:
        """The sum over the enumerated blocks of weighted values, [D, L], and, for blocks that were
        drawn, what each draw estimates, [samples, K]; 0 for the others."""
        blocks = torch.zeros(len(values), len(self.random), dtype=torch.double)
        blocks.index_add_(1, torch.arange(values.shape[1]) // self.size, self.weight * values)
        drawn = torch.zeros(samples, len(self.random), dtype=torch.double)
        if self.random.any():
            drawn = blocks[:samples] * self.random * samples
        return blocks[:, ~self.random].sum(), drawn


def draw(
    noise: Noise, row: Sequence[int], block_length: int | None, maskable: Tensor, samples: int,
    seed: int, start: int,
) -> Draws:  # fmt: skip
    """The noise of a row: `samples` for each block, stratified in their number of masked tokens, or
    all masks there are if those are no more and show nothing random; of a free noise, stratified in
    time.

    Args:
        noise: over the vocabulary.
        maskable: [L] bool, none of them before `start`.
        seed: the draws depend on it and on the row, or on what stands before a start above 1.
    """
    size = block_length or len(row)
    key = content_key(row[:start] if start > 1 else row)
    firsts = range(0, len(row), size)
    blocks = [maskable[first : first + size].nonzero()[:, 0] + first for first in firsts]
    begun = start // size  # continuations of one context share the draws of their common blocks
    times = draw_times(samples, len(blocks) - begun, keyed_generator(seed, key, 1))
    ids, shows = torch.tensor(row), keyed_generator(seed, key, 3)
    if noise.free:
        return _drawn(noise, ids, maskable, size, times, begun, shows)
    order = torch.rand(len(row) - start, samples, generator=keyed_generator(seed, key, 2)).T
    most = 0 if noise.random else samples  # with what they show, they are too many to enumerate
    subsets = [subsets_of(len(places), most) for places in blocks]
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
    xt = noise.hide(ids.expand_as(masked), masked, shows)
    return Draws(xt, masked, weight, random, size)


def _drawn(
    noise: Noise, ids: Tensor, maskable: Tensor, size: int, times: Tensor, begun: int,
    generator: torch.Generator,
) -> Draws:  # fmt: skip
    """The draws of a free noise, of which every maskable token counts.

    Args:
        times: [D, K - begun] in (0, 1), for the blocks from number `begun` on.
    """
    times = times.sort(0).values  # in the order of their strata, as `Estimate` takes them
    times, factors = bound_times(torch.cat([times.new_ones(len(times), begun), times], 1))
    block = torch.arange(len(ids)) // size
    t, weight = times[:, block], factors[:, block] / len(times)
    none, copies = torch.zeros_like(maskable), range(len(times))
    xt = [noise.draw(ids, maskable, none, t[d], t[d], generator)[0] for d in copies]
    random = torch.zeros(times.shape[1]).index_add_(0, block, maskable.float()) > 0
    return Draws(torch.stack(xt), maskable.expand_as(t), weight * maskable, random, size, t)


def subsets_of(n: int, most: int) -> list[tuple[int, ...]]:
    """All subsets of n tokens but the empty one; none of them if they are more than `most`."""
    if n > most or 2**n - 1 > most:
        return []
    return [subset for k in range(1, n + 1) for subset in combinations(range(n), k)]
