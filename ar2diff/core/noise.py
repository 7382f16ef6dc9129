"""What a noise is: what an open slot shows, and what that says about the token that belongs there.

A noise runs in one of two forms. *Tracked*: the sampler knows which slots are open. An open slot
shows a filler whose law does not depend on what belongs there, so the loss, the bound and the rules
of committing are those of the mask. *Free*: nobody knows which tokens are right. Every slot of a
block shows a draw from q(xt | x0), any of them may still change, and a block is decided at its last
step.

A network trained with cross-entropy on slots whose own token says nothing predicts x0 from all
*other* slots (as AR and mask models do); in the free form, what a slot shows adds its evidence, log
q(xt | v) up to a constant, to the logits, which makes them Bayes' posterior. Between two steps, a
token v is drawn from the posterior and xs from q(xs | xt, v), which is the kernel of D3PM (Austin
et al. 2021), GIDD (von Rütte et al. 2025) and Duo (Sahoo et al. 2025).

The kinds are in `noises.py`. These files are copied into converted folders. They are read along
with a spec, long before torch is needed, so they use what tensors bring along and import torch only
within functions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

from .errors import Ar2DiffError, shortened

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from .fitted import Fitted

FORMS = ("tracked", "free")
LOGITS = ("others", "posterior")
# Times below it count as it: the evidence is infinite at 0. Noise that begins like sqrt(t), as that
# of GIDD does, costs hundredths of a nat per token before a time of 1e-4.
EARLIEST = 1e-12
LEAST = 1e-300  # of what is divided by, or has a logarithm
UPGRADE = "upgrade ar2diff, or convert the base model again"


@dataclass(frozen=True)
class Noise:
    """A forward process. Subclasses are its kinds.

    In what follows, t and s < t are [N] times in (0, 1], double; x is [N], what slots show at t; v
    is [N] ids, x0 or draws of it; u is [N] double, uniform in [0, 1).

    A kind whose open slots show ids defines `marginal`, `between`, `into` and `prior`; the rest
    follows, by sums over the vocabulary, or is defined once more where it can be had for less.

    Attributes:
        form: `tracked` or `free`.
        logits: free: what the model's logits at a slot mean: a prediction from the `others`, to
            which the evidence is added, or the `posterior` itself, which has read the slot.
        mask, ids, size: the mask id, the K ids that may be written, and the size of the vocabulary;
            see `on`.
        fitted: what was fitted to the model and its texts when it was converted; None: nothing.
    """

    form: str = "tracked"
    logits: str = "others"
    mask: int = field(default=-1, compare=False, repr=False, kw_only=True)
    ids: Tensor | None = field(default=None, compare=False, repr=False, kw_only=True)
    size: int = field(default=0, compare=False, repr=False, kw_only=True)
    fitted: Fitted | None = field(default=None, compare=False, repr=False, kw_only=True)

    kind: ClassVar[str]
    forms: ClassVar[tuple[str, ...]]
    shows: ClassVar[str]  # what an open slot shows, in words
    undecided: ClassVar[str] = "no slot is known to be right before the last step"
    starts_masked: ClassVar[bool] = True  # at t = 1, all open slots show the mask
    visible: ClassVar[bool] = True  # an open slot may look like a token
    certain: ClassVar[bool] = False  # a slot that shows a token, shows its own
    guesses: ClassVar[bool] = False  # an open slot shows what the model guessed there
    fits: ClassVar[bool] = False  # it is fitted to a model and its texts
    fitted_by: ClassVar[tuple[str, ...]] = ()  # the parameters on which that depends
    vectors: ClassVar[bool] = False  # an open slot shows a vector in place of an embedding

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
    def fills(self) -> bool:
        """Whether what is given can be told from open slots at t = 1, so that gaps can be filled
        between given tokens."""
        return self.starts_masked or self.certain

    @property
    def described(self) -> str:
        """What an open slot shows, and what that means for decoding, as part of a sentence."""
        how = (
            f"{self.undecided}, so decoding takes a fixed number of steps for each block, and no "
            "threshold"
            if self.free
            else "the sampler knows which slots are open, and decides them by a threshold or in "
            "steps"
        )
        return f"{self.shows} ({self.kind}, {self.form}): {how}"

    def on(self, mask_token_id: int, suppressed: Tensor) -> Noise:
        """This noise over a vocabulary.

        Args:
            suppressed: [V] bool, ids that no position can hold. A fitted noise shows the ids that
                it was fitted to.
        """
        ids = (~suppressed).nonzero()[:, 0].cpu() if self.fitted is None else self.fitted["ids"]
        return replace(self, mask=mask_token_id, ids=ids, size=len(suppressed))

    def fit(self, table: Tensor, counts: Tensor, allowed: Tensor) -> dict[str, Tensor]:
        """What this noise keeps of a model and its texts, for kinds that are fitted.

        Args:
            table: [V, H] embeddings. counts: [V] how often each token occurs in texts.
            allowed: [V] bool, ids that positions can hold.

        Returns:
            Named tensors; `ids` [K] are the ids that are allowed.

        Raises:
            Ar2DiffError: it cannot be fitted to them.
        """
        raise NotImplementedError

    def check(self, tensors: Mapping[str, Tensor], size: tuple[int, int]) -> None:
        """Refuse tensors that `fit` cannot have returned for a model.

        Args:
            size: of the embeddings, V and H.

        Raises:
            ValueError, KeyError: they are of another model, or of none.
        """
        import torch

        for name, x in tensors.items():
            if x.dtype not in (torch.long, torch.float32, torch.double) or not x.isfinite().all():
                raise ValueError(f"{name} holds no numbers of the kind that it should")
        ids = tensors["ids"]
        if (
            ids.dtype != torch.long
            or ids.dim() != 1
            or not len(ids)
            or (ids.diff() <= 0).any()
            or ids[0] < 0
        ):
            raise ValueError("its ids are not in order")
        if ids[-1] >= size[0]:
            raise ValueError("it has ids that the model lacks")

    def to_dict(self) -> dict[str, Any]:
        """As a spec names it: the kind, its parameters and, if it is fitted, the SHA-256 of what
        was fitted."""
        values = asdict(replace(self, ids=None, fitted=None))
        for name in ("mask", "ids", "size", "fitted"):
            del values[name]
        kept = {} if self.fitted is None else {"sha256": self.fitted.sha256}
        return {"kind": self.kind, **values, **kept}

    # The process

    def marginal(self, v: Tensor, t: Tensor) -> Tensor:
        """[N, V] q(xt | x0), where x0 is drawn from v [N, V]."""
        raise NotImplementedError

    def between(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """[N, V] q(xt = x | xs) for each id xs."""
        raise NotImplementedError

    def into(self, x: Tensor, t: Tensor) -> Tensor:
        """[N, V], or [N, 1] where it is the same for all, the rate at which each id becomes x."""
        raise NotImplementedError

    def prior(self, u: Tensor) -> Tensor:
        """[N] what an open slot shows at t = 1."""
        return (u * 0).long() + self.mask if self.starts_masked else self.drawn(u)

    def drawn(self, u: Tensor) -> Tensor:
        """One of the K ids for each u [N], all as likely."""
        return self.ids[(u * len(self.ids)).long().clamp(max=len(self.ids) - 1)]

    def noised(self, x0: Tensor, t: Tensor, u: Tensor) -> Tensor:
        """[N] a draw from q(xt | x0).

        Args:
            u: [2, N] double, uniform in [0, 1).
        """
        parts = zip(x0.split(ROWS), t.split(ROWS), u[0].split(ROWS), strict=True)
        return _cat([pick(self.marginal(self.only(x), at), w) for x, at, w in parts], x0)

    def state(self, x: Tensor, x0: Tensor | None = None, t: Tensor | None = None) -> Tensor:
        """[N] what ids x stand for that `prior` returned, or `draw` for x0 at t: themselves, or,
        where slots show vectors, these, [N, H]."""
        return x

    def blank(self, ids: Tensor) -> Tensor:
        """What a canvas of ids [R, T] shows before its open slots show the prior."""
        return ids.clone()

    def embedded(self, x: Tensor) -> Tensor:
        """[N, H] the embeddings of vectors that slots show."""
        raise NotImplementedError

    def hide(self, x0: Tensor, hidden: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The ids with the prior in hidden slots.

        Args:
            x0: int ids. hidden: bool, of the same shape.
            generator: draws what is shown, unless that is the mask.
        """
        if self.starts_masked:
            return x0.masked_fill(hidden, self.mask)
        u = uniform(x0.shape, generator)
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
        noisy = self.noised(x0, t, uniform((2, len(x0)), generator))
        return x0.where(~maskable, noisy), maskable, t

    def step(self, x: Tensor, v: Tensor, t: Tensor, s: Tensor, u: Tensor) -> Tensor:
        """[N] what open slots show next, given ids v drawn from the posterior."""
        if not self.free:
            return self.prior(u)
        parts = zip(*(y.split(ROWS) for y in (x, v, t, s, u)), strict=True)
        return _cat(
            [pick(self.log_q(y, a, b, self.only(w)).exp(), z) for y, w, a, b, z in parts], x
        )

    def only(self, v: Tensor) -> Tensor:
        """[N, V] the law of ids v that are known."""
        import torch

        return torch.nn.functional.one_hot(v, self.size).double()

    # Evidence

    def log_likely(self, x: Tensor, t: Tensor) -> Tensor:
        """[N, V] log q(xt = x | v) for each id v, up to a constant of each slot."""
        raise NotImplementedError

    def evidence(self, x: Tensor, t: Tensor) -> Evidence:
        """What slots add to their logits by what they show."""
        return Evidence(x, t.clamp(min=EARLIEST), self)

    def added(self, x: Tensor, t: Tensor) -> Evidence | None:
        """`evidence` where logits lack it; None where nothing is to be added: an open slot of the
        tracked form says nothing, and a posterior has read its slot."""
        return self.evidence(x, t) if self.free and self.logits == "others" else None

    def others(self, logits: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """[N, V] the model's prediction from the other slots, given its logits [N, V]."""
        if self.logits == "others":
            return logits
        return self.evidence(x, t).add_(logits.clone(), sign=-1)

    def guesses_for(self, count: int, generator: torch.Generator) -> Tensor | None:
        """[N] double, the uniform numbers with which a trainer draws guesses of the model for the
        `count` tokens of a text, to show them in its open slots; -1 where a slot keeps what it
        shows. None: the noise has no guesses."""
        return None

    def with_guesses(self, x: Tensor, v: Tensor, where: Tensor) -> Tensor:
        """[N] what slots show that have guesses v in places `where` [N] bool."""
        return v.where(where, x)

    # The bound

    def log_q(self, x: Tensor, t: Tensor, s: Tensor, v: Tensor) -> Tensor:
        """[N, V] log q(xs | xt = x, x0 = v) for each id xs: a step of the reverse process when the
        text is known.

        Args:
            v: [N, V] probabilities of x0: one-hot, or a prediction from the others.
        """
        at_s, at_t = self.marginal(v, s), self.marginal(v, t)
        return (at_s * self.between(x, t, s) / at_t.gather(1, x[:, None])).log()

    def step_nats(self, logits: Tensor, x0: Tensor, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """[N] KL(q(xs | xt, x0) || p(xs | xt)), what a step of the T-step bound costs: at s = 0,
        -log p(x0 | xt).

        Args:
            logits: [N, V], a prediction from the others, with suppressed ids at -inf.
        """
        v = logits.double().softmax(-1)
        q, p = self.log_q(x, t, s, _at(x0, v)), self.log_q(x, t, s, v)
        return (q.exp() * (q - p).masked_fill(q.isneginf(), 0.0)).sum(-1)

    def nats(self, logits: Tensor, x0: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """[N] what a slot adds to the bound on -log p(x0) per unit of time, the limit of many
        steps: the sum over y != x of b(y, x) (ĝ - g + g log(g / ĝ)), with g(y) = q(y | x0) / q(x |
        x0), ĝ the same under the model, and b the rate at which y becomes x (SEDD, Lou et al. 2024;
        GIDD, eq. 11).

        Arguments as of `step_nats`.
        """
        v = logits.double().softmax(-1)
        g, h = self.marginal(_at(x0, v), t), self.marginal(v, t)
        g, h = (y / y.gather(1, x[:, None]) for y in (g, h))
        ratio = g.where(g > 0, 1.0) / h.where(g > 0, 1.0)  # else a gradient would be 0 * inf
        others = (h - g + g * ratio.log()).scatter(1, x[:, None], 0.0)
        return (self.into(x, t).to(v) * others).sum(-1)


@dataclass(frozen=True)
class Evidence:
    """What slots add to their logits, computed a few rows at a time.

    Attributes:
        shown, t: [N] what they show, and their times.
        noise: whose `log_likely` it is.
    """

    shown: Tensor
    t: Tensor
    noise: Noise

    def __len__(self) -> int:
        return len(self.shown)

    def on(self, shown: Tensor, t: Tensor) -> Evidence:
        """The same, of tensors on another device."""
        return replace(self, shown=shown, t=t)

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """The arguments of `on`."""
        return self.shown, self.t

    def add_(self, logits: Tensor, rows: slice = slice(None), sign: int = 1) -> Tensor:
        """Adds it to logits [n, V] of some rows, in place.

        Args:
            sign: -1 subtracts it.
        """
        likely = self.noise.log_likely(self.shown[rows], self.t[rows])
        return logits.add_(likely.to(logits), alpha=sign)


@dataclass(frozen=True)
class OwnEvidence:
    """Evidence that concerns one id alone, the one that a slot shows.

    Attributes:
        shown, gain: [N] the ids, and what their logits gain.
    """

    shown: Tensor
    gain: Tensor

    def __len__(self) -> int:
        return len(self.shown)

    def on(self, shown: Tensor, gain: Tensor) -> OwnEvidence:
        """See `Evidence`."""
        return OwnEvidence(shown, gain)

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """See `Evidence`."""
        return self.shown, self.gain

    def add_(self, logits: Tensor, rows: slice = slice(None), sign: int = 1) -> Tensor:
        """See `Evidence`."""
        gain = self.gain[rows, None].to(logits)
        return logits.scatter_add_(1, self.shown[rows, None], gain if sign == 1 else -gain)


def wrong(name: str, value: Any, wanted: str) -> Ar2DiffError:
    """The error for a value of a key of `diffusion.noise`, or for the noise itself."""
    key = f"diffusion.noise.{name}".rstrip(".")
    return Ar2DiffError(f"{key} is {shortened(value)}, but must be {wanted}", UPGRADE)


ROWS = 512  # of [N, V] at a time, in draws


def is_number(value: Any) -> bool:
    """Whether a parameter of a spec is a number."""
    return type(value) in (int, float)


def uniform(shape: Sequence[int], generator: torch.Generator | None) -> Tensor:
    """Uniform numbers in [0, 1), double."""
    import torch

    return torch.rand(shape, generator=generator, dtype=torch.double)


def pick(p: Tensor, u: Tensor) -> Tensor:
    """[N] ids drawn from unnormalised probabilities p [N, V] by the uniform numbers u [N]; none
    whose probability is 0."""
    edges = p.cumsum(1)
    point = u[:, None] * edges[:, -1:]
    return (edges <= point).sum(1).clamp(max=p.shape[1] - 1)


def _at(x0: Tensor, like: Tensor) -> Tensor:
    """[N, V] one-hot ids."""
    return like.new_zeros(like.shape).scatter_(1, x0[:, None], 1.0)


def _cat(parts: list[Tensor], like: Tensor) -> Tensor:
    import torch

    return torch.cat(parts) if parts else like
