"""Noises `gaussian` and `nearest`: random walks on the ids (D3PM, Austin et al. 2021).

A token jumps to neighbours with symmetric rates R [K, K], whose rows sum to 0, so that after a
walk of length tau it is q(xt | x0) = exp(tau R), and any id, all as likely, in the end. How long
the walk is at time t is fitted to the texts: a share t of what is known of a token is then lost.

This file is copied into converted folders. It imports torch within functions alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from .errors import Ar2DiffError, option
from .fitted import GEOMETRIC, Schedule, entropy_of, knots_of
from .noise import EARLIEST, Evidence, Noise, is_number, wrong

if TYPE_CHECKING:
    from torch import Tensor

MOST = 4096  # ids of which the rates are a dense matrix, whose eigenvectors take a minute
NEVER = 1e-20  # what is less likely cannot be told from rounding
LONGEST = 1e12  # a walk that ends anywhere
POINTS, SAMPLES = 120, 512  # of a schedule: lengths that are tried, and tokens at each


@dataclass(frozen=True)
class Walk(Noise):
    """A random walk; a kind defines `graph`, which is kept, and `rates_of`."""

    form: str = "free"

    forms = ("free",)
    starts_masked = False
    fits = True
    axes: ClassVar[int]  # of what `graph` returns

    def graph(self, table: Tensor) -> Tensor:
        """What is kept of the embeddings [K, H] of the ids, double: integers."""
        raise NotImplementedError

    def rates_of(self, graph: Tensor, count: int) -> Tensor:
        """[K, K] double, how often a token jumps to another one per unit of length; 0 on the
        diagonal.

        Args:
            graph: as `graph` returned it. count: K.
        """
        raise NotImplementedError

    def fit(self, table: Tensor, counts: Tensor, allowed: Tensor) -> dict[str, Tensor]:
        """See `Noise`: `graph`, and the `knots` of the schedule."""
        ids = allowed.nonzero()[:, 0]
        if len(ids) > MOST:
            raise Ar2DiffError(
                f"{option('noise.kind', self.kind)} holds a number for each pair of tokens, but "
                f"the model has {len(ids)} tokens, more than {MOST}",
                f"use {option('noise.kind')} uniform or mask_uniform",
            )
        graph = self.graph(table[ids].double())
        values, vectors = _spectrum(self.rates_of(graph, len(ids)))
        return {"ids": ids, "graph": graph, "knots": _knots(values, vectors, counts[ids])}

    def check(self, tensors: Mapping[str, Tensor], size: tuple[int, int]) -> None:
        """See `Noise`."""
        super().check(tensors, size)
        ids, graph = tensors["ids"], tensors["graph"]
        Schedule(tensors["knots"])
        if len(ids) > MOST or graph.dtype != ids.dtype or graph.min() < 0:
            raise ValueError("it holds no graph")
        if len(graph) != len(ids) or graph.dim() != self.axes or graph.max() >= len(ids):
            raise ValueError("its graph is not one of its ids")

    def marginal(self, v: Tensor, t: Tensor) -> Tensor:
        """See `Noise`."""
        values, vectors = self._walks(v)
        among = v[:, self.fitted.at("ids", v)] @ vectors
        return self._spread(among * (self._length(t)[:, None] * values).exp(), vectors)

    def between(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """See `Noise`."""
        return self._from(x, self._length(t) - self._length(s))

    def into(self, x: Tensor, t: Tensor) -> Tensor:
        """See `Noise`."""
        y, slope = self._schedule.at(t)
        rates = t.new_zeros(len(x), self.size)
        known = self.fitted.once(("rates", t.device), lambda: self._rates.to(t.device))
        rates[:, self.fitted.at("ids", t)] = known[self._number(x)]
        return (y.exp() * slope)[:, None] * rates

    def log_likely(self, x: Tensor, t: Tensor) -> Tensor:
        """See `Noise`."""
        return self._from(x, self._length(t)).clamp(min=NEVER).log()

    def evidence(self, x: Tensor, t: Tensor) -> Evidence:
        """See `Noise`."""
        return Evidence(x, t.clamp(EARLIEST, 1), self)

    @property
    def _rates(self) -> Tensor:
        held, count = self.fitted, len(self.fitted["ids"])
        return held.once("rates", lambda: self.rates_of(held["graph"], count))

    @property
    def _schedule(self) -> Schedule:
        return self.fitted.once("schedule", lambda: Schedule(self.fitted["knots"]))

    def _walks(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Eigenvalues [K] and eigenvectors [K, K] of the rates."""
        found = self.fitted.once("spectrum", lambda: _spectrum(self._rates))
        return self.fitted.once(
            ("spectrum", like.device), lambda: tuple(x.to(like.device) for x in found)
        )

    def _length(self, t: Tensor) -> Tensor:
        """[N] tau."""
        y, _ = self._schedule.at(t.double())
        return y.exp().clamp(max=LONGEST)

    def _number(self, x: Tensor) -> Tensor:
        """[N] the numbers of ids among those of the walk."""
        import torch

        return torch.searchsorted(self.fitted.at("ids", x), x).clamp(max=len(self.ids) - 1)

    def _from(self, x: Tensor, length: Tensor) -> Tensor:
        """[N, V] where walks from x end; as likely, those that end at x began there."""
        values, vectors = self._walks(length)
        return self._spread(vectors[self._number(x)] * (length[:, None] * values).exp(), vectors)

    def _spread(self, among: Tensor, vectors: Tensor) -> Tensor:
        """[N, V] from [N, K] in terms of the eigenvectors."""
        found = among.new_zeros(len(among), self.size)
        found[:, self.fitted.at("ids", among)] = (among @ vectors.T).clamp(min=NEVER)
        return found


@dataclass(frozen=True)
class Gaussian(Walk):
    """D3PM's discretised Gaussian: tokens jump to near ones in an order of the ids, the less likely
    the farther. The order is that of the embeddings along the line on which they differ most (their
    first principal component), or of the ids themselves, which for most tokenizers means little
    more than how frequent tokens are. The jumps have the same width at all times, where D3PM's grow
    with its schedule.

    Attributes:
        order: `component` or `ids`.
        width: standard deviation of a jump, as a share of all ids.
    """

    order: str = "component"
    width: float = 0.02

    kind = "gaussian"
    fitted_by = ("order", "width")
    axes = 1
    shows = "an open slot shows a token near the right one in an order of all tokens"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.order not in ("component", "ids"):
            raise wrong("order", self.order, "component or ids")
        if not (is_number(self.width) and 0 < self.width <= 1):
            raise wrong("width", self.width, "a number above 0, and at most 1")

    def graph(self, table: Tensor) -> Tensor:
        """See `Walk`: the rank of each id."""
        import torch

        if self.order == "ids":
            return torch.arange(len(table))
        centred = table - table.mean(0)
        _, _, axes = torch.linalg.svd(centred, full_matrices=False)
        along = centred @ axes[0]
        along = along * along[along.abs().argmax()].sign()  # the same on every machine
        return along.argsort(stable=True).argsort()

    def rates_of(self, graph: Tensor, count: int) -> Tensor:
        """See `Walk`."""
        import torch

        rank = graph.double()
        wide = max(1.0, self.width * count)
        near = (-(((rank[:, None] - rank) / wide) ** 2) / 2).exp().fill_diagonal_(0.0)
        return near / (2 * (-((torch.arange(1, count).double() / wide) ** 2) / 2).exp().sum())


@dataclass(frozen=True)
class Nearest(Walk):
    """D3PM's nearest neighbours: tokens jump to those whose embeddings point in about the same
    direction.

    Attributes:
        neighbours: k; each token is linked to its k nearest, and thereby to those of which it is
            one.
    """

    neighbours: int = 10

    kind = "nearest"
    fitted_by = ("neighbours",)
    axes = 2
    shows = "an open slot shows a token whose embedding is near that of the right one"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (is_number(self.neighbours) and self.neighbours in range(1, MOST)):
            raise wrong("neighbours", self.neighbours, f"a whole number from 1 to {MOST - 1}")
        object.__setattr__(self, "neighbours", int(self.neighbours))

    def graph(self, table: Tensor) -> Tensor:
        """See `Walk`: the k nearest of each id [K, k].

        Raises:
            Ar2DiffError: some ids cannot be reached from others.
        """
        import torch

        rows = torch.nn.functional.normalize(table, dim=1)
        alike = (rows @ rows.T).fill_diagonal_(-torch.inf)
        count = min(self.neighbours, len(table) - 1)
        found = alike.topk(count, 1).indices if count else torch.zeros(len(table), 1).long()
        if (parts := _parts(found)) > 1:
            raise Ar2DiffError(
                f"with {option('noise.parameters.neighbours', self.neighbours)}, the "
                f"model's tokens fall into {parts} groups between which there are no jumps",
                "set more neighbours, for instance twice as many",
            )
        return found

    def check(self, tensors: Mapping[str, Tensor], size: tuple[int, int]) -> None:
        """See `Noise`."""
        super().check(tensors, size)
        graph = tensors["graph"]
        if graph.shape[1] > len(graph) or _parts(graph) > 1:
            raise ValueError("its graph has parts without a link")

    def rates_of(self, graph: Tensor, count: int) -> Tensor:
        """See `Walk`."""
        import torch

        links = torch.zeros(count, count).double().scatter_(1, graph, 1.0).fill_diagonal_(0.0)
        return (links + links.T) / (2 * graph.shape[1])


def _parts(graph: Tensor) -> int:
    """How many parts a graph of links [K, k] has, followed in both directions."""
    linked: list[set[int]] = [set() for _ in graph]
    for one, others in enumerate(graph.tolist()):
        for other in others:
            linked[one].add(other)
            linked[other].add(one)
    left, parts = set(range(len(linked))), 0
    while left:
        parts += 1
        reached = [left.pop()]
        while reached:
            new = linked[reached.pop()] & left
            left -= new
            reached += new
    return parts


def _spectrum(rates: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors of R. The largest eigenvalue is 0, that of all ids alike."""
    import torch

    values, vectors = torch.linalg.eigh(rates - torch.diag(rates.sum(1)))
    values = values.clamp(max=0.0)
    values[-1] = 0.0
    return values, vectors


def _knots(values: Tensor, vectors: Tensor, counts: Tensor) -> Tensor:
    """The knots of the schedule, of the logarithm of the length."""
    import torch

    p, entropy = entropy_of(counts)
    some = torch.arange(len(p))
    if len(p) > SAMPLES:  # x0 drawn by its law, which walks then spread over all xt
        grid = (torch.arange(SAMPLES).double() + 0.5) / SAMPLES
        some = torch.searchsorted(p.cumsum(0), grid).clamp(max=len(p) - 1)
    weight = p if len(p) <= SAMPLES else torch.full((SAMPLES,), 1 / SAMPLES).double()
    lengths, lost = torch.linspace(*GEOMETRIC, POINTS).double(), []
    for length in lengths.exp():
        spread = vectors * (length * values).exp()
        of_some = (spread[some] @ vectors.T).clamp(min=NEVER)  # q(xt | x0)
        shown = (spread @ (vectors.T @ p)).clamp(min=NEVER)  # q(xt)
        own = -(p[some, None] * of_some / shown).log()
        lost.append((weight[:, None] * of_some * own).sum())
    lost = torch.stack(lost) / entropy
    try:
        return knots_of(lengths, lost)
    except ValueError:
        raise Ar2DiffError(
            "the jumps of the noise lose what is known of a token at no even pace: "
            f"{len(lengths)} lengths of walks are too few, or rounding hides them",
            "use more neighbours or wider jumps",
        ) from None
