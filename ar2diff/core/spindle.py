"""Noise `spindle`: masks that fall on informative tokens first.

This file is copied into converted folders. It imports torch within functions alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .errors import Ar2DiffError
from .fitted import entropy_of
from .noise import EARLIEST, Evidence, Noise, is_number, wrong

if TYPE_CHECKING:
    from torch import Tensor

LEAST_SLOPE = 0.05  # of a token's share of masks at t = 0; 1 without a spindle
MOST_STRENGTH = 1 / math.pi  # above it, the rarest tokens would be unmasked again towards the end


@dataclass(frozen=True)
class Spindle(Noise):
    """DiffusionBERT's noise (He et al. 2023, eq. 7): an open slot shows the mask, and a token is
    masked the sooner the more information it has,

        m_v(t) = t + strength sin(pi t) (1 - H / H_v),

    with H_v = -log p(v), counted in the texts, and H their mean. As which slots show masks says
    something of their tokens, it is never tracked. The mean is that of all texts: a mean over each
    text, as published, is not known when the text is written. Tokens so frequent that their share
    of masks would shrink at first have the least slope that grows.

    Attributes:
        strength: from 0, the plain mask, to 1 / pi.
    """

    form: str = "free"
    strength: float = 0.3

    kind = "spindle"
    shows = "an open slot shows the mask, and tokens with more information sooner"
    undecided = "tokens stay once they are shown, and which slots show one is drawn"
    forms = ("free",)
    certain = True
    fits = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.logits != "others":
            raise wrong("logits", self.logits, "others for kind spindle, where tokens are certain")
        if not (is_number(self.strength) and 0 <= self.strength <= MOST_STRENGTH):
            wanted = f"a number from 0 to {MOST_STRENGTH:.3f}, above which rare tokens would be "
            raise wrong("strength", self.strength, f"{wanted}unmasked again")

    def fit(self, table: Tensor, counts: Tensor, allowed: Tensor) -> dict[str, Tensor]:
        """See `Noise`: `information` [K], 1 - H / H_v."""
        ids = allowed.nonzero()[:, 0]
        p, mean = entropy_of(counts[ids])
        if len(ids) < 2:
            raise Ar2DiffError("noise.kind spindle needs two tokens", "use another noise.kind")
        return {"ids": ids, "information": 1 + mean / p.log()}

    def check(self, tensors: Mapping[str, Tensor], size: tuple[int, int]) -> None:
        """See `Noise`."""
        super().check(tensors, size)
        information = tensors["information"]
        if information.shape != tensors["ids"].shape or not (information < 1).all():
            raise ValueError("the information of its tokens is not that of any texts")

    def growth(self, like: Tensor) -> Tensor:
        """[V] by how much faster than t the masks on each token grow at first: m_v' - 1 at 0."""

        def make() -> Tensor:
            slope = self.strength * math.pi * self.fitted["information"]
            every = slope.new_zeros(self.size)
            every[self.ids] = slope.clamp(min=LEAST_SLOPE - 1)
            return every.to(like.device)

        return self.fitted.once(("growth", self.strength, self.size, like.device), make)

    def masked(self, t: Tensor) -> Tensor:
        """[N, V] m_v(t)."""
        return t[:, None] * (1 + self.growth(t) * t[:, None].sinc())

    def marginal(self, v: Tensor, t: Tensor) -> Tensor:
        """See `Noise`."""
        masked = self.masked(t).to(v)
        found = (1 - masked) * v
        found[:, self.mask] += (masked * v).sum(1)
        return found

    def between(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """See `Noise`."""
        import torch

        kept = (1 - self.masked(t)) / (1 - self.masked(s))
        hidden = (x == self.mask)[:, None]
        same = torch.zeros_like(kept).scatter_(1, x[:, None], 1.0)
        found = (1 - kept).where(hidden, same * kept)
        found[:, self.mask] = hidden[:, 0].double()
        return found

    def into(self, x: Tensor, t: Tensor) -> Tensor:
        """See `Noise`."""
        rate = 1 + self.growth(t) * (math.pi * t[:, None]).cos()
        return (rate / (1 - self.masked(t))).masked_fill((x != self.mask)[:, None], 0.0)

    def noised(self, x0: Tensor, t: Tensor, u: Tensor) -> Tensor:
        """See `Noise`."""
        return x0.masked_fill(u[0] < self._at(x0, t), self.mask)

    def step(self, x: Tensor, v: Tensor, t: Tensor, s: Tensor, u: Tensor) -> Tensor:
        """See `Noise`."""
        before, after = self._at(v, t), self._at(v, s)
        shown = v.masked_fill(u * before < after, self.mask)
        return shown.where(x == self.mask, x)

    def log_likely(self, x: Tensor, t: Tensor) -> Tensor:
        """See `Noise`: of a token that is shown, none but itself is possible."""
        import torch

        hidden = (x == self.mask)[:, None]
        certain = torch.full((len(x), self.size), -math.inf, dtype=torch.double, device=x.device)
        certain.scatter_(1, x[:, None], 0.0)
        return self.masked(t).log().where(hidden, certain)

    def evidence(self, x: Tensor, t: Tensor) -> Evidence:
        """See `Noise`."""
        return Evidence(x, t.clamp(EARLIEST), self)

    def nats(self, logits: Tensor, x0: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """See `Noise`: with the rates r_v = m_v' / m_v it is r_x0 CE + E[r] - r_x0, the expectation
        over the posterior, at a mask, and 0 at a token."""
        hidden = x == self.mask
        return super().nats(logits, x0, x * 0 + self.mask, t) * hidden

    def _at(self, v: Tensor, t: Tensor) -> Tensor:
        """[N] m of each token."""
        return t * (1 + self.growth(t)[v] * t.sinc())
