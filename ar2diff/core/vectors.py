"""Noise `embedding`: an open slot shows the embedding of its token among Gaussian noise.

This file is copied into converted folders. It imports torch within functions alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .errors import Ar2DiffError
from .fitted import Schedule, entropy_of, knots_of
from .noise import EARLIEST, Evidence, Noise, is_number, uniform, wrong

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SEEDS = 1 << 40  # of what ids below 0 stand for
CLEAREST = 60.0  # the most of log(ᾱ / (1 - ᾱ)); the least is its negative
POINTS, SAMPLES = 144, 1024  # of a schedule: noise levels, and tokens at each
LEVELS = -24.0, 12.0  # of -log(ᾱ / (1 - ᾱ)), between which the schedule is tabulated
FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9  # of splitmix64
THIRD = 0x94D049BB133111EB


@dataclass(frozen=True)
class Embedding(Noise):
    """Gaussian diffusion of embeddings (Diffusion-LM, Li et al. 2022; SED, Strudel et al. 2022):

        z(t) = sqrt(ᾱ(t)) e_x0 + sqrt(1 - ᾱ(t)) noise,

    with the rows e_v of the model's embeddings as they were when it was converted, divided by their
    mean length and multiplied by sqrt(H), so that they are as long as the noise. The network is
    given z at the scale of its embeddings, in their place, and predicts x0 from the other slots;
    what a slot shows adds log N(z; sqrt(ᾱ) e_v, 1 - ᾱ) to its logits. Between two steps, a token v
    is drawn from the posterior and z(s) from q(z(s) | z(t), e_v): all x0 are rows (clamping), and
    the last ones are the text (rounding). ᾱ is such that a share t of what is known of a token is
    lost at time t; it is 1 at t = 0, where z is a row.

    Ids below 0 stand for the noise in a slot until it is computed from them, on any device.

    Attributes:
        guessed: self-conditioning (SED): share of the texts in training whose slots also show the
            rows of what the model guesses there, added to z, as a stock network has no other input
            for them; when decoding, those of what was drawn at the step before. 0: none.
    """

    form: str = "free"
    guessed: float = 0.0

    kind = "embedding"
    shows = "an open slot shows the embedding of its token among Gaussian noise"
    forms = ("free",)
    starts_masked = False
    certain = True
    fits = True
    vectors = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (is_number(self.guessed) and 0 <= self.guessed <= 1):
            raise wrong("guessed", self.guessed, "a number from 0 to 1")

    @property
    def guesses(self) -> bool:
        """See `Noise`."""
        return self.guessed > 0

    def fit(self, table: Tensor, counts: Tensor, allowed: Tensor) -> dict[str, Tensor]:
        """See `Noise`: `rows` [V, H], `length` of the model's own rows over those, and the `knots`
        of the schedule of -log(ᾱ / (1 - ᾱ))."""
        ids, table = allowed.nonzero()[:, 0], table.double()
        length = table[ids].norm(dim=1).mean() / math.sqrt(table.shape[1])
        rows = (table / length).float()
        knots = _knots(rows[ids].double(), counts[ids])
        return {"ids": ids, "rows": rows, "length": length.double().view(1), "knots": knots}

    def check(self, tensors: Mapping[str, Tensor], size: tuple[int, int]) -> None:
        """See `Noise`."""
        super().check(tensors, size)
        Schedule(tensors["knots"])
        if (*tensors["rows"].shape,) != (*size,) or not tensors["rows"].is_floating_point():
            raise ValueError("its rows are not those of the model")
        if tensors["length"].shape != (1,) or not tensors["length"] > 0:
            raise ValueError("its rows have no length")

    # What slots show

    def prior(self, u: Tensor) -> Tensor:
        """See `Noise`."""
        return -1 - (u * SEEDS).long()

    def noised(self, x0: Tensor, t: Tensor, u: Tensor) -> Tensor:
        """See `Noise`."""
        return self.prior(u[1])

    def state(self, x: Tensor, x0: Tensor | None = None, t: Tensor | None = None) -> Tensor:
        """See `Noise`."""
        z = normal(-1 - x, self._rows(x).shape[1])
        if x0 is not None:
            kept, noise = self._scales(t)
            z = kept * self._rows(x)[x0] + noise * z
        return self._beside(z, z * 0)

    def embedded(self, x: Tensor) -> Tensor:
        """See `Noise`."""
        z, row = self._parts(x)
        return (z if row is None else z + row) * float(self.fitted["length"])

    def blank(self, ids: Tensor) -> Tensor:
        """See `Noise`."""
        import torch

        width = self.fitted["rows"].shape[1] * (1 + self.guesses)
        return torch.zeros(*ids.shape, width, dtype=torch.double)

    def guesses_for(self, count: int, generator: torch.Generator) -> Tensor | None:
        """See `Noise`."""
        if not self.guesses:
            return None
        u = uniform((count + 1,), generator)
        return u[1:].where(u[0] < self.guessed, u[1:] * 0 - 1)

    def with_guesses(self, x: Tensor, v: Tensor, where: Tensor) -> Tensor:
        """See `Noise`."""
        z, _ = self._parts(x)
        return self._beside(z, self._rows(x)[v] * where[:, None])

    def step(self, x: Tensor, v: Tensor, t: Tensor, s: Tensor, u: Tensor) -> Tensor:
        """See `Noise`."""
        z, _ = self._parts(x)
        rows, noise = self._rows(x)[v].double(), normal((u * SEEDS).long(), z.shape[1])
        mean, spread = self.between_steps(z.double(), rows, t, s)
        return self._beside(mean + spread * noise, rows).to(x)

    def between_steps(self, z: Tensor, rows: Tensor, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """The mean [N, H] and the standard deviation [N, 1] of z(s), given z(t) and the row of x0
        (Diffusion-LM, eq. 2)."""
        (kept_t, noise_t), (kept_s, noise_s) = self._scales(t), self._scales(s)
        ratio = kept_t / kept_s
        new = (noise_t**2 - (ratio * noise_s) ** 2).clamp(min=0)  # noise that falls between
        mean = (kept_s * new * rows + ratio * noise_s**2 * z) / noise_t**2
        return mean, noise_s * new.sqrt() / noise_t

    # What it says

    def log_likely(self, x: Tensor, t: Tensor) -> Tensor:
        """See `Noise`."""
        z, _ = self._parts(x)
        rows, (kept, noise) = self._rows(x).to(z), (y.to(z) for y in self._scales(t))
        half = self.fitted.once(("half", x.device, z.dtype), lambda: (rows**2).sum(1) / 2)
        return kept / noise**2 * (z @ rows.T) - (kept / noise) ** 2 * half

    def evidence(self, x: Tensor, t: Tensor) -> Evidence:
        """See `Noise`."""
        return Evidence(x, t.clamp(EARLIEST), self)

    def nats(self, logits: Tensor, x0: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """See `Noise`: -(ᾱ / (1 - ᾱ))' / 2 times the squared distance between the row of x0 and the
        mean of the rows under the posterior (VDM, Kingma et al. 2021, eq. 17)."""
        y, slope = self._schedule.at(t)
        rows = self._rows(x).double()
        posterior = (logits.double() + self.log_likely(x.double(), t)).softmax(-1)
        apart = ((rows[x0] - posterior @ rows) ** 2).sum(-1)
        return (-y).exp() * slope / 2 * apart

    @property
    def _schedule(self) -> Schedule:
        return self.fitted.once("schedule", lambda: Schedule(self.fitted["knots"]))

    def _scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """[N, 1] sqrt(ᾱ) and sqrt(1 - ᾱ)."""
        y, _ = self._schedule.at(t.double())
        y = y.clamp(-CLEAREST, CLEAREST)[:, None]
        return (-y).sigmoid().sqrt() * (t < 1)[:, None], y.sigmoid().sqrt().where(
            (t < 1)[:, None], 1.0
        )

    def _rows(self, like: Tensor) -> Tensor:
        return self.fitted.at("rows", like)

    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """z, and the row that was drawn before, [N, H]; None: the noise has none."""
        return x.chunk(2, -1) if self.guesses else (x, None)

    def _beside(self, z: Tensor, row: Tensor) -> Tensor:
        import torch

        return torch.cat([z, row.to(z)], -1) if self.guesses else z


def normal(seeds: Tensor, width: int) -> Tensor:
    """[N, H] normal numbers, double: of each seed [N] its own, the same on every device but for
    rounding. They are hashes of seed and column (splitmix64)."""
    import torch

    column = torch.arange(width, device=seeds.device)
    x = (seeds[:, None] * (1 << 20) + column + 1) * _signed(FIRST)
    x = (x ^ _shifted(x, 30)) * _signed(SECOND)
    x = (x ^ _shifted(x, 27)) * _signed(THIRD)
    x = x ^ _shifted(x, 31)
    u = (_shifted(x, 11).double() + 0.5) / (1 << 53)
    return torch.special.ndtri(u)


def _signed(x: int) -> int:
    return x - (1 << 64)


def _shifted(x: Tensor, places: int) -> Tensor:
    """A shift of 64 bits without a sign to the right."""
    return (x >> places) & ((1 << (64 - places)) - 1)


def _knots(rows: Tensor, counts: Tensor) -> Tensor:
    """The knots of the schedule, of -log(ᾱ / (1 - ᾱ))."""
    import torch

    p, entropy = entropy_of(counts)
    grid = (torch.arange(SAMPLES).double() + 0.5) / SAMPLES
    x0 = torch.searchsorted(p.cumsum(0), grid).clamp(max=len(p) - 1)
    noise, half = normal(torch.arange(SAMPLES), rows.shape[1]), (rows**2).sum(1) / 2
    levels, lost = torch.linspace(*LEVELS, POINTS).double(), []
    for level in levels:
        kept = math.exp(-float(level) / 2)  # sqrt(ᾱ / (1 - ᾱ)), in units of the noise
        z = kept * rows[x0] + noise
        likely = p.log() + kept * (z @ rows.T) - kept**2 * half
        lost.append(-likely.log_softmax(-1)[torch.arange(SAMPLES), x0].mean())
    try:
        return knots_of(levels, torch.stack(lost) / entropy)
    except ValueError:
        raise Ar2DiffError(
            "Gaussian noise on this model's embeddings loses what is known of a token at no even "
            "pace: its schedule is not monotone",
            "use another noise.kind; this model may have too few tokens",
        ) from None
