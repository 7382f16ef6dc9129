"""The kinds of noise, and the reader of the one that a spec or a recipe names.

The kinds in this file interpolate between a token and noise,

    q(xt | x0) = a(t) [xt = x0] + m(t) [xt = mask] + u(t) / K      (K ids may be written)

and differ in a, m and u alone; the others have a file each.

To add a kind, write a class here, name it in `KINDS`, and add it to the tables of
tests/test_noises.py. This file is copied into converted folders.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .errors import Ar2DiffError, nearest, shortened
from .fitted import fitted_of
from .noise import EARLIEST, FORMS, LEAST, Noise, OwnEvidence, is_number, uniform, wrong
from .spindle import Spindle
from .vectors import Embedding
from .walks import Gaussian, Nearest

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Interpolating(Noise):
    """Between a token and noise: a kind defines `shares` and `rates`."""

    def shares(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """a, m and u: the probabilities that a token is itself, the mask, or any of the K."""
        raise NotImplementedError

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """a (m/a)' and a (u/a)': the rates at which tokens become the mask, and any of the K."""
        raise NotImplementedError

    def marginal(self, v: Tensor, t: Tensor) -> Tensor:
        """See `Noise`."""
        from .transfer import upload

        a, m, u = (y.to(v)[:, None] for y in self.shares(t))
        noise = v.new_zeros(1, v.shape[1])
        noise[0, upload(v.device, self.ids)[0]] = 1 / len(self.ids)
        masks = v.new_zeros(1, v.shape[1])
        masks[0, self.mask] = 1.0
        return a * v + m * masks + u * noise

    def between(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """See `Noise`."""
        kept, jumped = self._between(x, t, s)
        shown = kept.new_zeros(len(x), self.size).scatter_(1, x[:, None], 1.0)
        return kept[:, None] * shown + jumped[:, None]

    def into(self, x: Tensor, t: Tensor) -> Tensor:
        """See `Noise`."""
        masking, mixing = self.rates(t)
        return (mixing / len(self.ids)).where(x != self.mask, masking)[:, None]

    def noised(self, x0: Tensor, t: Tensor, u: Tensor) -> Tensor:
        """See `Noise`."""
        a, m, _ = self.shares(t)
        noisy = self.drawn(u[1])
        return noisy.masked_fill(u[0] < a + m, self.mask).where(u[0] >= a, x0)

    def evidence(self, x: Tensor, t: Tensor) -> OwnEvidence:
        """Of the token that is shown alone: log q(x | v) for v = x, less its value for any other v.
        It is 0 for a mask."""
        a, _, u = self.shares(t.clamp(min=EARLIEST))
        gain = (a * len(self.ids) / u.clamp(min=LEAST)).log1p().masked_fill(x == self.mask, 0.0)
        return OwnEvidence(x, gain)

    def step(self, x: Tensor, v: Tensor, t: Tensor, s: Tensor, u: Tensor) -> Tensor:
        """See `Noise`."""
        if not self.free:
            return self.prior(u)
        kept, jumped = self._between(x, t, s)
        (a, m, w), same = self.shares(s), (x == v).double()
        parts = [  # of q(xs | xt, v): xs is xt; it is v; it is the mask; it is any id
            kept * (a * same + self._noise_at(x, m, w)), jumped * a, jumped * m, jumped * w,
        ]  # fmt: skip
        point = u * sum(parts)
        last = parts[0] + parts[1] + parts[2]
        anything = self.drawn(((point - last) / parts[3].clamp(min=1e-300)).clamp(0, 1))
        shown = anything.masked_fill(point < last, self.mask)
        shown = v.where(point < parts[0] + parts[1], shown)
        return x.where(point < parts[0], shown)

    def _between(self, x: Tensor, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """[N] a(t) / a(s), the chance that no noise falls on a slot between s and t, and the chance
        that noise falls on it and leaves x there."""
        (a, m, u), (b, n, w) = self.shares(t), self.shares(s)
        kept = a / b
        return kept, self._noise_at(x, (m - kept * n).clamp(min=0), (u - kept * w).clamp(min=0))

    def _noise_at(self, x: Tensor, m: Tensor, u: Tensor) -> Tensor:
        """[N] the chance that noise with these shares is x."""
        return (u / len(self.ids)).where(x != self.mask, m)


@dataclass(frozen=True)
class Mask(Interpolating):
    """MDLM's absorbing noise (Sahoo et al. 2024): an open slot shows the mask. It is the same
    process in both forms, and has no parameters."""

    kind = "mask"
    shows = "an open slot shows the mask"
    forms = ("tracked",)
    visible = False
    certain = True

    def shares(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `Noise`."""
        return 1 - t, t, t * 0

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """See `Noise`."""
        return 1 / (1 - t), t * 0


@dataclass(frozen=True)
class Uniform(Interpolating):
    """An open slot shows any id, all as likely (D3PM-uniform, Austin et al. 2021).

    Attributes:
        schedule: of a(t): `linear`, 1 - t, or `cosine`, D3PM's cos((t + 0.008) / 1.008 * pi / 2)
            over its value at 0, not squared.
    """

    schedule: str = "linear"

    kind = "uniform"
    shows = "an open slot shows any token, all as likely"
    forms = FORMS
    starts_masked = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.schedule not in ("linear", "cosine"):
            raise wrong("schedule", self.schedule, "linear or cosine")

    def shares(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `Noise`."""
        a = 1 - t if self.schedule == "linear" else self._angle(t).cos() / self._angle(t * 0).cos()
        a = a.clamp(min=0)
        return a, t * 0, 1 - a

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """See `Noise`."""
        a, _, _ = self.shares(t)
        slope = t * 0 + 1
        if self.schedule == "cosine":
            slope = self._angle(t).sin() / self._angle(t * 0).cos() * (math.pi / 2 / 1.008)
        return t * 0, slope / a

    @staticmethod
    def _angle(t: Tensor) -> Tensor:
        return (t + 0.008) / 1.008 * math.pi / 2


@dataclass(frozen=True)
class MaskUniform(Interpolating):
    """GIDD (von Rütte et al. 2025): an open slot shows the mask or, halfway, any id,

        q = ((1 - t) x0 + t mask + c(t) / K) / (1 + c(t)),  c = B (t (1 - t))^(gamma / 2).

    Attributes:
        p_u: the share of any ids at t = 1/2, where c / (1 + c) = p_u; above 0, below 1.
        gamma: how sharply that share falls towards both ends; above 0, at most 2.
    """

    form: str = "free"
    p_u: float = 0.1
    gamma: float = 1.0

    kind = "mask_uniform"
    shows = "an open slot shows the mask or, halfway, any token"
    forms = ("free",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (is_number(self.p_u) and 0 < self.p_u < 1):
            raise wrong("p_u", self.p_u, "a number above 0 and below 1")
        if not (is_number(self.gamma) and 0 < self.gamma <= 2):
            wanted = "a number above 0, and at most 2, or the noise would shrink before the end"
            raise wrong("gamma", self.gamma, wanted)

    def shares(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `Noise`."""
        c = self._scale * (t * (1 - t)) ** (self.gamma / 2)
        return (1 - t) / (1 + c), t / (1 + c), c / (1 + c)

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """See `Noise`."""
        a, half, left = self.shares(t)[0], self.gamma / 2, 1 - t
        growth = t ** (half - 1) * left ** (half - 2) * (half * left + (1 - half) * t)
        return a / left**2, a * self._scale * growth

    @property
    def _scale(self) -> float:
        return 2**self.gamma * self.p_u / (1 - self.p_u)


@dataclass(frozen=True)
class SelfGuess(Interpolating):
    """An open slot shows the mask until the model has guessed a token there, and then the guess
    (on-policy uniform training of DMax). As nothing tells a guess from a decided token, the same
    training teaches the model to correct what it has decided (token-to-token editing, LLaDA 2.1).

    Attributes:
        guessed: share of the texts in training whose open slots show guesses; in the others they
            show masks.
    """

    guessed: float = 0.5

    kind = "self"
    shows = "an open slot shows the mask, and then what the model guessed there"
    forms = ("tracked",)
    guesses = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (is_number(self.guessed) and 0 < self.guessed <= 1):
            raise wrong("guessed", self.guessed, "a number above 0, and at most 1")

    def guesses_for(self, count: int, generator: torch.Generator) -> Tensor:
        """See `Noise`."""
        u = uniform((count + 1,), generator)
        return u[1:].where(u[0] < self.guessed, u[1:] * 0 - 1)

    def step(self, x: Tensor, v: Tensor, t: Tensor, s: Tensor, u: Tensor) -> Tensor:
        """See `Noise`: the guess."""
        return v


KINDS = (Mask, Uniform, MaskUniform, SelfGuess, Spindle, Gaussian, Nearest, Embedding)


def noise_of(value: Any) -> Noise:
    """The noise that a spec or a recipe names: `mask`, or an object with a kind and its parameters.

    Raises:
        Ar2DiffError: an unknown kind or parameter, or a value out of range; it names the key.
    """
    if isinstance(value, Noise):
        return value
    named = value if isinstance(value, Mapping) else {"kind": value}
    found = {known.kind: known for known in KINDS}
    if named.get("kind") not in [*found]:
        key = "kind" if isinstance(value, Mapping) else ""
        raise wrong(key, named.get("kind"), f"one of {', '.join(found)}")
    kind = found[named["kind"]]
    known = [*kind().to_dict(), *(["sha256"] if kind.fits else [])]
    for name in named:
        if name not in known:
            raise Ar2DiffError(
                f"diffusion.noise has a key that kind {kind.kind} lacks, {shortened(name)}"
                f"{nearest(str(name), known)}",
                f"its keys are {', '.join(known)}",
            )
    values = {name: v for name, v in named.items() if name not in ("kind", "sha256")}
    if "sha256" not in named:
        return kind(**values)
    try:
        return kind(**values, fitted=fitted_of(named["sha256"]))
    except ValueError as error:
        raise wrong("sha256", named["sha256"], str(error)) from None
