"""The forward process of a sequence: its noise levels, which slots are open, and what they show.

The noise depends only on the seed, the epoch and the document's ids, so batching, ranks, packing
and resuming do not change it. Where the open slots are known, we do not draw a Bernoulli(t) per
token, but open exactly k of the n slots in a block, with k = ceil(t n) and t ~ U(0, 1). Then k is
uniform on 1..n, no block is left untouched, and the weight n / k makes the loss an unbiased
estimate of the bound (LLaDA, Nie et al. 2025, eq. 6). Other laws of t make other k more likely;
their weight is n / k times 1 / (n P(k)). What an open slot shows is up to the noise
(core/noise.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.noise import EARLIEST, Noise
from ..core.seeds import keyed_generator

GOLDEN = 0.6180339887498949  # frac(n * GOLDEN) is a low-discrepancy sequence


@dataclass(frozen=True)
class Law:
    """The distribution of times in (0, 1).

    Attributes:
        kind: `uniform`; `bell`, Beta(2, 2), with density 6 t (1 - t), which trains masked models
            faster than the uniform law (2605.13026, for another bell); or `all`: 1 with
            probability `share`, otherwise uniform.
        share: see `all`.
    """

    kind: str = "uniform"
    share: float = 0.0

    def times(self, uniform: Tensor) -> Tensor:
        """The inverse of the distribution function, so that stratified uniforms become stratified
        times; `uniform` itself for the law of that name."""
        if self.kind == "uniform":
            return uniform
        u = uniform.double()
        if self.kind == "bell":  # the root in [0, 1] of 3 t^2 - 2 t^3 = u
            return 0.5 - torch.sin(torch.asin(1 - 2 * u) / 3)
        return torch.where(u < 1 - self.share, u / max(1 - self.share, math.ulp(1)), 1.0)

    def below(self, t: Tensor) -> Tensor:
        """The distribution function, P(time <= t)."""
        if self.kind == "uniform":
            return t
        if self.kind == "bell":
            return t * t * (3 - 2 * t)
        return torch.where(t < 1, (1 - self.share) * t, 1.0)

    @property
    def mean(self) -> float:
        """The mean time: the share of the tokens that are masked."""
        return (1 + self.share) / 2 if self.kind == "all" else 0.5


def importance(
    maskable: Tensor, block: Tensor, t: Tensor, law: Law, complementary: bool = False
) -> Tensor:
    """[L] double: how much likelier the uniform law makes each block's number of masked tokens than
    `law` does. This factor on the weight 1/t keeps the loss an unbiased estimate of the bound. It
    is 0 for a block in which nothing can be masked.

    Args:
        maskable, block, complementary: as passed to `open_slots` with times of the law. t: as it
            returned it.
    """
    count = torch.zeros(int(block.max()) + 1, dtype=torch.long)
    count = count.index_add_(0, block, maskable.long())[block]
    cells = count + complementary  # of equal width in t, one for each possible k
    last = (t * cells).round() + complementary  # right edge of the cell of k
    cells = cells.clamp(min=1)
    share = law.below(last / cells) - law.below((last - 1) / cells)
    return torch.where(count > 0, 1 / (cells * share), 0.0)


def block_times(blocks: int, time: str, seed: int, epoch: int, key: int, document: int) -> Tensor:
    """[blocks] times in (0, 1) for the blocks of one sequence.

    `block`: one time per block, stratified over the blocks of the sequence. `sequence`, `document`:
    one time for all blocks; over the epochs these form a low-discrepancy sequence, keyed by the
    sequence itself or by the document it was cut from.
    """
    if time == "block":
        generator = keyed_generator(seed, epoch, key, 1)
        return _stratified(blocks, generator)
    start = torch.rand((), generator=keyed_generator(seed, key if time == "sequence" else document))
    return ((start.double() + epoch * GOLDEN) % 1.0).float().expand(blocks)


def draw_times(draws: int, blocks: int, generator: torch.Generator) -> Tensor:
    """[draws, blocks] times for a likelihood estimate; the draws of each block are stratified."""
    return torch.stack([_stratified(draws, generator) for _ in range(blocks)], 1)


def bound_times(u: Tensor) -> tuple[Tensor, Tensor]:
    """Times in (0, 1) for uniform numbers in [0, 1), and their weights: an integral over time is
    the mean of what it integrates times the weight. Both ends, where integrands of bounds grow, are
    drawn more often than they are long."""
    u = u.double()
    t = torch.sin(math.pi / 2 * u) ** 2
    return t.clamp(EARLIEST, 1 - EARLIEST), math.pi / 2 * torch.sin(math.pi * u)


def _stratified(n: int, generator: torch.Generator) -> Tensor:
    order = torch.randperm(n, generator=generator)
    return (order + torch.rand(n, generator=generator)) / n


def holds(noise: Noise, ids: Tensor) -> Tensor:
    """[N] bool, which of some ids the noise may hide and the model write: not the mask, nor what
    stands for images, which texts may name all the same."""
    known = noise.ids
    if known is None:
        return ids != noise.mask
    at = torch.searchsorted(known, ids).clamp(max=len(known) - 1)
    return (known[at] == ids) & (ids != noise.mask)


def corrupt(
    noise: Noise,
    x0: Tensor,
    maskable: Tensor,
    block: Tensor,
    times: Tensor,
    generator: torch.Generator,
    complementary: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Put one sequence under noise.

    Args:
        noise: over its vocabulary. x0: [L] ids.
        maskable, block, times, generator, complementary: as passed to `open_slots`.

    Returns:
        xt: [views, L] ids. scored: [views, L] bool, the slots in the loss. t: [views, L] double,
        from which their weights are computed. There is a second view if complementary.
    """
    chosen, share = open_slots(maskable, block, times, generator, complementary)
    views = [(chosen, share)]
    if complementary:
        views.append(complement(maskable, block, chosen, share))
    t = times.double()[block]
    drawn = [noise.draw(x0, maskable, *view, t, generator) for view in views]
    xt, scored, weighed = zip(*drawn, strict=True)
    return torch.stack(xt), torch.stack(scored), torch.stack(weighed)


def replaced(
    noise: Noise, x0: Tensor, maskable: Tensor, most: float, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """One sequence with some of its tokens replaced by any others, of which the model is to say
    what stood there: floor(a n) of n tokens, a uniform in [0, most] (the edit-based corruption of
    Seed Diffusion, Song et al. 2025; it also inserts and deletes, but does not say how the text and
    the targets are then aligned).

    Args:
        noise, x0, maskable: as passed to `corrupt`.

    Returns:
        xt, scored, t: [L], as those of a view of `corrupt`. All maskable tokens are scored, and
        have the weight of t = 1.
    """
    share = most * torch.rand((), generator=generator).double()
    count = int(share * int(maskable.sum()))
    order = torch.rand(len(x0), generator=generator).masked_fill(~maskable, 2.0).argsort()
    other = noise.drawn(torch.rand(count, generator=generator, dtype=torch.double))
    return x0.index_copy(0, order[:count], other), maskable, torch.ones(len(x0)).double()


def given_spans(
    count: int, most: int, dropped: float, generator: torch.Generator
) -> tuple[Tensor, bool]:
    """Which tokens of a text are given: n spans, n uniform on 1..`most`, whose boundaries are as
    likely anywhere, are given in turns, beginning with the first or the second; a single one is not
    (SED, Strudel et al. 2022).

    Args:
        count: tokens of the text; the first one is never part of a span.
        dropped: how often the given spans show masks instead.

    Returns:
        given: [count] bool. Whether they are to show masks.
    """
    given, room = torch.zeros(count, dtype=torch.bool), count - 1
    spans = min(int(torch.randint(1, most + 1, (), generator=generator)), room)
    flipped, drops = torch.rand(2, generator=generator).tolist()
    if spans > 1:
        starts = torch.zeros(room, dtype=torch.long)
        starts[1 + torch.randperm(room - 1, generator=generator)[: spans - 1]] = 1
        given[1:] = (starts.cumsum(0) + (flipped < 0.5)) % 2 == 1
    return given, drops < dropped


def open_slots(
    maskable: Tensor,
    block: Tensor,
    times: Tensor,
    generator: torch.Generator,
    complementary: bool = False,
) -> tuple[Tensor, Tensor]:
    """Choose the open slots of one sequence, those that are masked.

    Args:
        maskable: [L] bool, positions that may be masked.
        block: [L] int, the block that each position is in, 0..K-1.
        times: [K] in (0, 1).
        generator: CPU generator.
        complementary: the caller will use the complement too. Then k = floor(t (n + 1)) is uniform
            on 0..n for the mask and for its complement, and t becomes k / (n + 1): with weight 1/t
            both views are unbiased, and together they supervise each token exactly once.

    Returns:
        masked: [L] bool. t: [L] double, k / n for the block of each position, from which the loss
            weights are computed.
    """
    count = torch.zeros(len(times), dtype=torch.long).index_add_(0, block, maskable.long())
    if complementary:
        k = (times * (count + 1)).floor().long().clamp(max=count)
        t = k.double() / (count + 1)
    else:
        k = torch.minimum((times * count).ceil().long().clamp(min=1), count)
        t = k.double() / count.clamp(min=1)
    # Rank the positions of each block in random order, with unmaskable ones last.
    priority = torch.rand(len(block), generator=generator) + (~maskable).float()
    order = torch.argsort(block * 2.0 + priority.double())
    start = torch.searchsorted(block[order].contiguous(), torch.arange(len(times)))
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order)) - start[block[order]]
    return maskable & (rank < k[block]), t[block]


def complement(maskable: Tensor, block: Tensor, masked: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """The complementary view of a sequence that `open_slots` masked with `complementary=True`.

    Args:
        maskable, block: as passed to `open_slots`. masked, t: as it returned them.

    Returns:
        masked: [L] bool, the maskable positions that the first view shows. t: [L] double,
        (n - k) / (n + 1) where the first view has k / (n + 1).
    """
    count = torch.zeros(int(block.max()) + 1).index_add_(0, block, maskable.float())
    count = count[block].double()
    return maskable & ~masked, count / (count + 1) - t
