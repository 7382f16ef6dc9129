"""The noises: what an open slot shows, and what its token says about the token that belongs there.

A noise runs in one of two forms. *Tracked*: the sampler knows which slots are open. An open slot
shows a filler whose law does not depend on what belongs there, so the loss, the bound and the rules
of committing are those of the mask. *Free*: nobody knows which tokens are right. Every slot of a
block shows a draw from q(xt | x0), any of them may still change, and a block is decided at its last
step.

The kinds here interpolate between a token and noise,

    q(xt | x0) = a(t) [xt = x0] + m(t) [xt = mask] + u(t) / K      (K ids may be written)

and differ in a, m and u alone. A network trained with cross-entropy on slots whose own token says
nothing predicts x0 from all *other* slots (as AR and mask models do); in the free form the slot's
own token adds its evidence, log q(xt | v) up to a constant, to the logits, which makes them Bayes'
posterior. Between two steps, a token v is drawn from the posterior and xs from q(xs | xt, v), which
is the kernel of D3PM (Austin et al. 2021), GIDD (von Rütte et al. 2025) and Duo (Sahoo et al.
2025).

To add a kind, write a class here, name it in `KINDS`, and add it to the tables of
tests/test_noises.py. This file is copied into converted folders. It is read along with a spec, long
before torch is needed, so it uses what tensors bring along and imports the standard library alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

from .errors import Ar2DiffError, nearest, shortened

if TYPE_CHECKING:
    import torch
    from torch import Tensor

FORMS = ("tracked", "free")
LOGITS = ("others", "posterior")
EARLIEST = 1e-4  # times below it count as it: a slot's evidence is infinite at 0
UPGRADE = "upgrade ar2diff, or convert the base model again"


@dataclass(frozen=True)
class Noise:
    """A forward process. Subclasses are its kinds.

    Attributes:
        form: `tracked` or `free`.
        logits: free: what the model's logits at a slot mean: a prediction from the `others`, to
            which the evidence is added, or the `posterior` itself, which has read the slot.
        mask, ids: the mask id, and the K ids that may be written; see `on`.
    """

    form: str = "tracked"
    logits: str = "others"
    mask: int = field(default=-1, compare=False, repr=False, kw_only=True)
    ids: Tensor | None = field(default=None, compare=False, repr=False, kw_only=True)

    kind: ClassVar[str]
    forms: ClassVar[tuple[str, ...]]
    shows: ClassVar[str]  # what an open slot shows, in words
    starts_masked: ClassVar[bool] = True  # at t = 1, all open slots show the mask
    visible: ClassVar[bool] = True  # an open slot may look like a token
    guesses: ClassVar[bool] = False  # an open slot shows what the model guessed there

    def __post_init__(self) -> None:
        if self.form not in self.forms:
            raise wrong("form", self.form, f"{' or '.join(self.forms)} for kind {self.kind}")
        if self.logits not in LOGITS:
            raise wrong("logits", self.logits, f"one of {', '.join(LOGITS)}")
        if self.logits == "posterior" and not self.free:
            raise wrong("logits", self.logits, "others in the tracked form, which has no evidence")

    @property
    def random(self) -> bool:
        """Whether what open slots show is drawn."""
        return self.free or not self.starts_masked

    @property
    def free(self) -> bool:
        """Whether no slot is known to be right before the last step."""
        return self.form == "free"

    @property
    def described(self) -> str:
        """What an open slot shows, and what that means for decoding, as part of a sentence."""
        how = (
            "no slot is known to be right before the last step, so decoding takes a fixed number "
            "of steps for each block, and no threshold"
            if self.free
            else "the sampler knows which slots are open, and decides them by a threshold or in "
            "steps"
        )
        return f"{self.shows} ({self.kind}, {self.form}): {how}"

    def on(self, mask_token_id: int, suppressed: Tensor) -> Noise:
        """This noise over a vocabulary.

        Args:
            suppressed: [V] bool, ids that no position can hold.
        """
        return replace(self, mask=mask_token_id, ids=(~suppressed).nonzero()[:, 0].cpu())

    def to_dict(self) -> dict[str, Any]:
        """As a spec names it: the kind, and its parameters."""
        values = asdict(replace(self, ids=None))
        del values["mask"], values["ids"]
        return {"kind": self.kind, **values}

    # The process, for t in (0, 1]. Tensors of times are float64 on the CPU.

    def shares(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """a, m and u: the probabilities that a token is itself, the mask, or any of the K."""
        raise NotImplementedError

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """a (m/a)' and a (u/a)': the rates at which tokens become the mask, and any of the K."""
        raise NotImplementedError

    def prior(self, u: Tensor) -> Tensor:
        """What an open slot shows at t = 1.

        Args:
            u: [N] double, uniform in [0, 1).
        """
        return (u * 0).long() + self.mask if self.starts_masked else self.drawn(u)

    def drawn(self, u: Tensor) -> Tensor:
        """One of the K ids for each u [N], all as likely."""
        return self.ids[(u * len(self.ids)).long().clamp(max=len(self.ids) - 1)]

    def hide(self, x0: Tensor, hidden: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The ids with the prior in hidden slots.

        Args:
            x0: int ids. hidden: bool, of the same shape.
            generator: draws what is shown, unless that is the mask.
        """
        if self.starts_masked:
            return x0.masked_fill(hidden, self.mask)
        u = _uniform(x0.shape, generator)
        return x0.where(~hidden, self.prior(u))

    def draw(
        self, x0: Tensor, maskable: Tensor, chosen: Tensor, share: Tensor, t: Tensor,
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """One sequence under the noise.

        Args:
            x0: [L] ids. maskable: [L] bool, those that the noise may touch.
            chosen: [L] bool, an exact number of slots of each block, to be open.
            share: [L] double, that number over the size of the block.
            t: [L] double, the times.

        Returns:
            xt: [L] ids. scored: [L] bool, the slots in the loss: the open ones, or, in the free
            form, all that may have changed. time: [L] double, from which weights are computed.
        """
        if not self.free:
            return self.hide(x0, chosen, generator), chosen, share
        a, m, _ = self.shares(t)
        u = _uniform((2, len(x0)), generator)
        noisy = self.drawn(u[1])
        noisy = noisy.masked_fill(u[0] < a + m, self.mask).where(u[0] >= a, x0)
        return x0.where(~maskable, noisy), maskable, t

    def evidence(self, x: Tensor, t: Tensor) -> Tensor:
        """[N] what the tokens x shown at times t add to the logits of those same tokens: log q(x |
        v) for v = x, less its value for any other v. It is 0 for a mask."""
        a, _, u = self.shares(t.clamp(min=EARLIEST))
        return (a * len(self.ids) / u.clamp(min=1e-300)).log1p().masked_fill(x == self.mask, 0.0)

    def added(self, x: Tensor, t: Tensor) -> Tensor | None:
        """[N] `evidence` where logits lack it; None where nothing is to be added: an open slot of
        the tracked form says nothing, and a posterior has read its slot."""
        return self.evidence(x, t) if self.free and self.logits == "others" else None

    def others(self, logits: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """[N, V] the model's prediction from the other slots, given its logits [N, V]."""
        if self.logits == "others":
            return logits
        evidence = self.evidence(x, t).to(logits)
        return logits.scatter_add(1, x[:, None], -evidence[:, None])

    def guesses_for(self, count: int, generator: torch.Generator) -> Tensor | None:
        """[N] double, the uniform numbers with which a trainer draws guesses of the model for the
        `count` open slots of a row, to show them there; -1 where a slot keeps what it shows. None:
        the noise has no guesses."""
        return None

    def step(self, x: Tensor, v: Tensor, t: Tensor, s: Tensor, u: Tensor) -> Tensor:
        """[N] what open slots show next.

        Args:
            x: [N] what they show at t. v: [N] ids drawn from the posterior.
            s: [N] double, the next time, below t.
            u: [N] double, uniform in [0, 1).
        """
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

    def log_q(self, x: Tensor, t: Tensor, s: Tensor, v: Tensor) -> Tensor:
        """[N, V] log q(xs | xt = x, x0 = v) for each id xs: a step of the reverse process when the
        text is known. Arguments as of `step`; V is the size of the vocabulary, [N, V] with the
        probabilities of v in its last axis: one-hot, or a prediction from the others."""
        kept, jumped = (y[:, None] for y in self._between(x, t, s))
        at_s, at_t = self.marginal(v, s), self.marginal(v, t)
        shown = at_s.new_zeros(at_s.shape).scatter_(1, x[:, None], 1.0)
        return (at_s * (kept * shown + jumped) / at_t.gather(1, x[:, None])).log()

    def marginal(self, v: Tensor, t: Tensor) -> Tensor:
        """[N, V] q(xt | x0), where x0 is drawn from v [N, V], at times [N]."""
        a, m, u = (y.to(v)[:, None] for y in self.shares(t))
        noise = v.new_zeros(1, v.shape[1])
        noise[0, self.ids.to(v.device)] = 1 / len(self.ids)
        masks = v.new_zeros(1, v.shape[1])
        masks[0, self.mask] = 1.0
        return a * v + m * masks + u * noise

    def step_nats(self, logits: Tensor, x0: Tensor, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """[N] KL(q(xs | xt, x0) || p(xs | xt)), what a step of the T-step bound costs; at s = 0,
        -log p(x0 | xt).

        Args:
            logits: [N, V], a prediction from the others, with suppressed ids at -inf.
            x0, x: [N] ids. t, s: [N] double.
        """
        v = logits.double().softmax(-1)
        known = v.new_zeros(v.shape).scatter_(1, x0[:, None], 1.0)
        t, s = t.clamp(min=EARLIEST), s.clamp(min=0)
        if not s.any():
            shown = self.marginal(known, t), self.marginal(v, t)
            q, p = (y.gather(1, x[:, None])[:, 0] for y in shown)
            return -(v.gather(1, x0[:, None])[:, 0] * q / p).log()
        q, p = self.log_q(x, t, s, known), self.log_q(x, t, s, v)
        return (q.exp() * (q - p).masked_fill(q.isneginf(), 0.0)).sum(-1)

    def nats(self, logits: Tensor, x0: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """[N] what a slot adds to the bound on -log p(x0) per unit of time, the limit of many
        steps: b(x) sum over y != x of ĝ - g + g log(g / ĝ), with g(y) = q(y | x0) / q(x | x0), ĝ
        the same under the model, and b the rate into x (GIDD, eq. 11; SEDD, Lou et al. 2024).

        Arguments as of `step_nats`.
        """
        v = logits.double().softmax(-1)
        known = v.new_zeros(v.shape).scatter_(1, x0[:, None], 1.0)
        g, h = self.marginal(known, t), self.marginal(v, t)
        g, h = (y / y.gather(1, x[:, None]) for y in (g, h))
        masking, mixing = (y.to(v) for y in self.rates(t))
        into = (mixing / len(self.ids)).where(x != self.mask, masking)
        ratio = (g / h).where(g > 0, 1.0)
        others = (h - g + g * ratio.log()).scatter(1, x[:, None], 0.0)
        return into * others.sum(-1)

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
class Mask(Noise):
    """MDLM's absorbing noise (Sahoo et al. 2024): an open slot shows the mask. It is the same
    process in both forms, and has no parameters."""

    kind = "mask"
    shows = "an open slot shows the mask"
    forms = ("tracked",)
    visible = False

    def shares(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `Noise`."""
        return 1 - t, t, t * 0

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """See `Noise`."""
        return 1 / (1 - t), t * 0


@dataclass(frozen=True)
class Uniform(Noise):
    """An open slot shows any id, all as likely (D3PM-uniform, Austin et al. 2021).

    Attributes:
        schedule: of a(t): `linear`, 1 - t, or `cosine`, D3PM's cos((t + 0.008) / 1.008 * pi / 2),
            which is not squared.
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
class MaskUniform(Noise):
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
        if not (_is_number(self.p_u) and 0 < self.p_u < 1):
            raise wrong("p_u", self.p_u, "a number above 0 and below 1")
        if not (_is_number(self.gamma) and 0 < self.gamma <= 2):
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
class SelfGuess(Noise):
    """An open slot shows the mask until the model has guessed a token there, and then the guess
    (on-policy uniform training of DMax). As nothing tells a guess from a decided token, the same
    training teaches the model to correct what it has decided (token-to-token editing, LLaDA 2.1).

    Attributes:
        guessed: share of the rows in training whose open slots show guesses; the others show masks.
    """

    guessed: float = 0.5

    kind = "self"
    shows = "an open slot shows the mask, and then what the model guessed there"
    forms = ("tracked",)
    guesses = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (_is_number(self.guessed) and 0 < self.guessed <= 1):
            raise wrong("guessed", self.guessed, "a number above 0, and at most 1")

    def guesses_for(self, count: int, generator: torch.Generator) -> Tensor:
        """See `Noise`."""
        u = _uniform((count + 1,), generator)
        return u[1:].where(u[0] < self.guessed, u[1:] * 0 - 1)

    def step(self, x: Tensor, v: Tensor, t: Tensor, s: Tensor, u: Tensor) -> Tensor:
        """See `Noise`: the guess."""
        return v


KINDS = (Mask, Uniform, MaskUniform, SelfGuess)


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
    known = [*kind().to_dict()]
    for name in named:
        if name not in known:
            raise Ar2DiffError(
                f"diffusion.noise has a key that kind {kind.kind} lacks, {shortened(name)}"
                f"{nearest(str(name), known)}",
                f"its keys are {', '.join(known)}",
            )
    return kind(**{name: v for name, v in named.items() if name != "kind"})


def wrong(name: str, value: Any, wanted: str) -> Ar2DiffError:
    """The error for a value of a key of `diffusion.noise`, or for the noise itself."""
    key = f"diffusion.noise.{name}".rstrip(".")
    return Ar2DiffError(f"{key} is {shortened(value)}, but must be {wanted}", UPGRADE)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _uniform(shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    import torch

    return torch.rand(shape, generator=generator, dtype=torch.double)
