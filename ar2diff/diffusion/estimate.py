"""Likelihoods of rows with the error that their noise draws leave, and differences of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Z = 1.959964  # a normal variable is within so many standard deviations in 95 % of the cases
# Cornish and Fisher's expansion of Student's t at that level, in powers of 1 / degrees of freedom.
STUDENT = (Z, 2.3723, 2.8225, 2.5558, 1.5895)


@dataclass(frozen=True)
class Estimate:
    """Likelihoods of rows, all [R].

    Attributes:
        nats: minus the log-likelihood, or an estimate of the bound on it.
        variance: of the estimate, due to the draws.
        spread: sum over the blocks of a row of the square of each block's part of `variance`.
        tokens: how many are scored.
        draws: for each row, [samples, K] what each draw gives for each block, less what is known
            without drawing; sorted by the number of masked tokens.
        greedy: of the AR mode, whether each scored token is the likeliest.
    """

    nats: Tensor
    variance: Tensor
    spread: Tensor
    tokens: Tensor
    draws: tuple[Tensor, ...] = ()
    greedy: Tensor | None = None

    @classmethod
    def exact(cls, nats: Tensor, tokens: Tensor, greedy: Tensor | None = None) -> Estimate:
        """Likelihoods without an error."""
        return cls(nats, torch.zeros_like(nats), torch.zeros_like(nats), tokens, greedy=greedy)

    @classmethod
    def of_draws(cls, exact: Tensor, draws: Sequence[Tensor], tokens: Tensor) -> Estimate:
        """The sum of what is known, [R], and of the mean of the draws; other arguments as of the
        class."""
        nats = exact + torch.stack([row.mean(0).sum() for row in draws])
        parts = [variance_of_mean(row) for row in draws]
        variance = torch.stack([part.sum() for part in parts])
        spread = torch.stack([part.square().sum() for part in parts])
        return cls(nats, variance, spread, tokens, tuple(draws))

    def row(self, number: int) -> Estimate:
        """The estimate of one row."""
        one = slice(number, number + 1)
        greedy = None if self.greedy is None else self.greedy[one]
        fields = self.nats[one], self.variance[one], self.spread[one], self.tokens[one]
        return Estimate(*fields, self.draws[one], greedy)

    @property
    def mean(self) -> float:
        """Nats per token."""
        return (self.nats.sum() / self.tokens.sum()).item()

    @property
    def error(self) -> float:
        """Standard error of `mean` due to the Monte Carlo draws (not to the choice of rows). Where
        they are few, it is wider than the spread of the draws, so that the true value lies within
        1.96 standard errors in 95 % of the cases all the same."""
        samples = max((len(row) for row in self.draws), default=1)
        total, spread = self.variance.sum().item(), self.spread.sum().item()
        return total**0.5 * widening(total, spread, samples) / self.tokens.sum().item()


def total_of(rows: Sequence[Estimate]) -> Estimate:
    """The estimate of a text that was scored in several rows, each of them an estimate."""
    nats, variance, spread, tokens = (
        sum(getattr(row, name).sum() for row in rows).view(1)
        for name in ("nats", "variance", "spread", "tokens")
    )
    draws = [draws for row in rows for draws in row.draws]
    return Estimate(nats, variance, spread, tokens, (torch.cat(draws, 1),) if draws else ())


def difference_of(
    one: Estimate, other: Estimate, size: float = 1, other_size: float = 1
) -> tuple[float, float]:
    """The nats of one row divided by a size, minus those of another, and the standard error. Rows
    that continue the same context share their draws, which makes the error of the difference less
    than those of the two.

    Args:
        one, other: estimates of a single row, from as many draws.
    """
    apart = one.nats.item() / size - other.nats.item() / other_size
    if not one.draws or not other.draws:
        return apart, 0.0
    both = [estimate.draws[0] for estimate in (one, other)]
    most = max(draws.shape[1] for draws in both)
    both = [torch.nn.functional.pad(draws, (0, most - draws.shape[1])) for draws in both]
    variance = variance_of_mean(both[0] / size - both[1] / other_size)
    total, spread = variance.sum().item(), variance.square().sum().item()
    return apart, total**0.5 * widening(total, spread, len(both[0]))


def variance_of_mean(draws: Tensor) -> Tensor:
    """[K] variance of the mean over stratified draws, [S, K] in the order of their strata.

    The differences of neighbours have the variance of the two strata and a step of the trend over
    the strata, which adds no variance: what they have in common is taken away. Of an odd number,
    the stratum in the middle counts like the mean of the others. Three draws are judged by how far
    the middle one lies off the line between the others, two by their difference, whatever the
    trend; one is NaN, unless it is 0, as what is known is.
    """
    samples = len(draws)
    if samples == 1:
        return torch.where(draws[0] == 0, 0.0, float("nan"))
    if samples == 2:
        return (draws[0] - draws[1]).square() / 4
    if samples == 3:
        return (draws[0] - 2 * draws[1] + draws[2]).square() / 18
    pairs, middle = samples // 2, samples // 4 * 2
    kept = draws if samples % 2 == 0 else torch.cat([draws[:middle], draws[middle + 1 :]])
    steps = kept[::2] - kept[1::2]
    bends = (steps - steps.mean(0)).square().sum(0) / (pairs - 1)  # of one pair
    return bends / (2 * samples)


def widening(total: float, spread: float, samples: int) -> float:
    """By how much Student's t exceeds a normal variable at 95 %, for a variance that is the sum of
    estimated parts (Satterthwaite, with the correction for parts of few degrees of freedom each).

    Args:
        total: the sum of the parts. spread: the sum of their squares. samples: draws of each.
    """
    if not spread > 0:
        return 1.0
    each = max(1, samples // 2 - 1)
    freedom = max(1.0, (each + 2) * total**2 / spread - 2)
    return sum(term / freedom**power for power, term in enumerate(STUDENT)) / Z
