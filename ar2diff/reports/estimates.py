"""Values with their standard errors: means, shares, quotients, medians, paired differences."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, median, stdev
from typing import Any

DRAWS = 1000  # of the bootstrap


@dataclass(frozen=True)
class Value:
    """An estimate. `error` is its standard error, `n` what it was made of."""

    value: float
    error: float
    n: int


def mean(values: Sequence[float]) -> Value:
    """The mean of at least two values."""
    return Value(fmean(values), stdev(values) / sqrt(len(values)), len(values))


def share(hits: Sequence[bool], scale: float = 100.0) -> Value:
    """The share of hits, in per cent. Where all or none are hits, the error is that of a sample
    with two more hits and two more misses, since its own would be 0."""
    n, count = len(hits), sum(map(bool, hits))
    p = count / n
    error = sqrt(p * (1 - p) / (n - 1)) if 0 < count < n else _padded(count + 2, n + 4)
    return Value(scale * p, scale * error, n)


def _padded(count: int, n: int) -> float:
    p = count / n
    return sqrt(p * (1 - p) / n)


def share_difference(ours: Sequence[bool], theirs: Sequence[bool], scale: float = 100.0) -> Value:
    """How much larger the share of hits is, from pairs. Where no pair differs, the error is that of
    half a pair each way more (Agresti and Min 2005)."""
    apart = [float(bool(a)) - float(bool(b)) for a, b in zip(ours, theirs, strict=True)]
    n = len(apart)
    error = stdev(apart) / sqrt(n) if any(apart) else 1 / (n + 2)
    return Value(scale * fmean(apart), scale * error, n)


def ratio(parts: Sequence[float], wholes: Sequence[float], scale: float = 1.0) -> Value:
    """The sum of the parts over the sum of the wholes, of at least two pairs: tokens per forward,
    nats per token. The error is that of a quotient of means."""
    n, whole = len(parts), sum(wholes)
    value = sum(parts) / whole
    rest = sum((a - value * b) ** 2 for a, b in zip(parts, wholes, strict=True))
    return Value(scale * value, scale * sqrt(n / (n - 1) * rest) / whole, n)


def ratio_difference(
    ours: tuple[Sequence[float], Sequence[float]], theirs: tuple[Sequence[float], Sequence[float]]
) -> Value:
    """`ratio` of our parts and wholes minus that of theirs, from pairs."""
    rests, values = [], []
    for parts, wholes in (ours, theirs):
        value, average = sum(parts) / sum(wholes), fmean(wholes)
        rests.append([(a - value * b) / average for a, b in zip(parts, wholes, strict=True)])
        values.append(value)
    error = mean([a - b for a, b in zip(*rests, strict=True)]).error
    return Value(values[0] - values[1], error, len(rests[0]))


def middle(values: Sequence[float]) -> Value:
    """The median, with a bootstrapped error."""
    return bootstrap(values, median)


def percentile(groups: Sequence[Sequence[float]], q: float) -> Value:
    """A percentile of all values, `q` from 0 to 1. Whole groups are drawn for its error, because
    the values of one are not independent."""
    return bootstrap(groups, lambda drawn: _quantile([v for group in drawn for v in group], q))


def bootstrap(items: Sequence[Any], statistic: Callable[[Sequence[Any]], float]) -> Value:
    """A statistic of items, with the standard deviation of those of items drawn with replacement;
    the same items give the same error."""
    rng = random.Random(0)
    drawn = [statistic(rng.choices(items, k=len(items))) for _ in range(DRAWS)]
    return Value(statistic(items), stdev(drawn), len(items))


def _quantile(values: Sequence[float], q: float) -> float:
    """Interpolated, as numpy does it."""
    ordered = sorted(values)
    place = q * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])
