"""Estimates of the log-likelihood of completions: which tokens are masked in which view, and how
the views are weighted. Takes `Rollout`s and returns log-probabilities per token.

    value_i = sum_v w_vi log p(y_i | what view v shows),  over the views v that mask token i

`one_step`    One view, with each block fully masked, given the clean blocks (d1, Zhao et al. 2025).
`coupled`     The mean of that view and a pair of complementary masks, in which each token is scored
              under the mask that covers it, weighted by the inverse of the masked share
              (DiffuCoder, Gong et al. 2025, eq. 6).
`elbo`        Complementary pairs with k of n tokens masked, k uniform on 0..n, weights (n+1) / k.
              The expectation is the bound on log p (ESPO, Ou et al. 2025). Of a noise in the free
              form, `samples` times, and what `Noise.nats` says each slot costs there.
`spg`         The same pairs: the lower bound for good completions, and an equal mix of it and an
              evidence upper bound for bad ones (SPG, Wang et al. 2025, eq. 8).
`unigrpo`     One view, in which some tokens are masked, and only these are scored: as they are, or,
              for ratios of sequences, by their mean. The share of masked tokens is random in the
              first update on a completion, grows evenly, and is 1 in the last (UniGRPO, Yang et al.
              2025, algorithm 1). What is estimated is no bound: views that show more count less.
`trajectory`  Each token is scored in the state in which it was decided (TraceRL, Wang et al. 2025).
              With blocks, there are at most as many views as a block took steps.
`ar`          The AR mode, from left to right.

Everything after an answer is masked in every view, as it was when the answer was begun: showing
where the canvas ends would leak the length of the answer. A trajectory shows what it decided
there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..config.rl import Rl
from ..core.attention import PADDING, Slots, reading_slot
from ..core.forward import output_at
from ..core.images import Images, seeing
from ..core.noise import Noise
from ..core.seeds import keyed_generator
from ..core.sight import has_places, places_of, until_of
from ..core.spec import Spec
from ..diffusion.corruption import bound_times, complement, draw_times, open_slots
from ..diffusion.likelihood import free_nats
from ..diffusion.task import Task, seen
from .modules import unwrapped
from .rollouts import Rollout

SPG_BETA, SPG_MIX = 1.5, 0.5  # order of the upper bound, and its weight in the mix


@dataclass(frozen=True)
class Scores:
    """Log-probabilities of masked tokens; all tensors [N].

    Attributes:
        logp, entropy: log-probability of a token, and the entropy there, in a view.
        row, view, place: the rollout, the view, and the index of the token within the answer.
        weight: weight of the token in the view.
        shape: the numbers of rollouts and views, and the length of the longest answer.
    """

    logp: Tensor
    entropy: Tensor
    row: Tensor
    view: Tensor
    place: Tensor
    weight: Tensor
    shape: tuple[int, int, int]

    def per_token(self, good: Tensor | None = None) -> Tensor:
        """[R, C] the contribution of each token to the estimate; zero where there is no token.

        Args:
            good: [R] bool, for `spg`: the rows that use the lower bound.
        """
        lower = self._sum(self.weight * self.logp)
        if good is None:
            return lower
        value = SPG_BETA * self.logp + self.weight.log()
        views = value.new_full(self.shape, float("-inf"))
        views = views.index_put((self.row, self.view, self.place), value)
        seen = views.isfinite().any(1)
        upper = torch.where(seen[:, None], views, 0.0).logsumexp(1) / SPG_BETA
        mixed = (1 - SPG_MIX) * lower + SPG_MIX * torch.where(seen, upper, 0.0)
        return torch.where(good[:, None], lower, mixed)

    def entropies(self) -> Tensor:
        """[R, C] entropies, averaged over the views that score each token; where none does, the
        mean of the row."""
        count, total = self._sum(torch.ones_like(self.entropy)), self._sum(self.entropy)
        mean = total.sum(1) / count.sum(1).clamp(min=1)
        return torch.where(count > 0, total / count.clamp(min=1), mean[:, None])

    def spread(self) -> Tensor:
        """[R] standard deviation of the single-view estimates over the views."""
        rows, views, _ = self.shape
        each = self.logp.new_zeros(rows, views)
        each = each.index_put((self.row, self.view), views * self.weight * self.logp, True)
        return each.std(1) if views > 1 else each.new_zeros(rows)

    def _sum(self, values: Tensor) -> Tensor:
        rows, _, tokens = self.shape
        return values.new_zeros(rows, tokens).index_put((self.row, self.place), values, True)


def views(rollout: Rollout, rl: Rl, spec: Spec) -> tuple[Tensor, Tensor]:
    """Which tokens are masked in each view, and their weights there.

    Returns:
        masked: [V, T] bool. weight: [V, T] double, zero where a token is not scored.
    """
    count = len(rollout.ids)
    answer = torch.zeros(count, dtype=torch.bool)
    answer[rollout.prompt : rollout.prompt + rollout.answer] = True
    all_ = answer[None]
    after = torch.arange(count) >= rollout.prompt + rollout.answer
    if rl.estimator == "ar":
        return torch.zeros_like(all_), all_.double()
    if rl.estimator == "one_step":
        generator = keyed_generator(rollout.seed, 1)
        prompt = torch.rand(count, generator=generator) < rl.prompt_mask
        prompt &= (torch.arange(count) > 0) & (torch.arange(count) < rollout.prompt)
        return (answer | prompt | after)[None], all_.double()
    block = _blocks(rollout, spec)
    if rl.estimator == "unigrpo":
        masked = _growing(rollout, answer, block, rl.num_iterations)
        mean = int(answer.sum()) / int(masked.sum()) if rl.level == "sequence" else 1
        return (masked | after)[None], masked[None].double() * mean
    if rl.estimator == "trajectory":
        return _trajectory(rollout, answer, block, rl.segments)
    masked, weight = zip(*_pairs(rollout, answer, block, rl), strict=True)
    return torch.stack(masked) | after, torch.stack(weight)


def _blocks(rollout: Rollout, spec: Spec) -> Tensor:
    """[T] the number of each token's block, from that of the first token of the answer on."""
    block = torch.zeros(len(rollout.ids), dtype=torch.long)
    if spec.attention != "full":
        block = torch.arange(len(block)) // spec.block_length
        block = (block - block[rollout.prompt]).clamp(min=0)
    return block


def _pairs(rollout: Rollout, answer: Tensor, block: Tensor, rl: Rl) -> list[tuple[Tensor, Tensor]]:
    """Complementary pairs of masks; for `coupled`, preceded by the fully masked view."""
    generator = keyed_generator(rollout.seed, 0)
    times = draw_times(rl.samples, int(block.max()) + 1, generator)
    coupled = rl.estimator == "coupled"
    found = [(answer, answer.double() / 2)] if coupled else []
    for time in times:
        if coupled:  # masks 20% to 80% of each block
            masked, t = open_slots(answer, block, 0.2 + 0.6 * time, generator)
            other, other_t = answer & ~masked, 1 - t
        else:
            masked, t = open_slots(answer, block, time, generator, complementary=True)
            other, other_t = complement(answer, block, masked, t)
        for mask, share in ((masked, t), (other, other_t)):
            weight = torch.where(mask, 1 / share.clamp(min=1e-9), 0.0) / (2 * rl.samples)
            found.append((mask, weight))
    return found


def _growing(rollout: Rollout, answer: Tensor, block: Tensor, updates: int) -> Tensor:
    """[T] bool, a share of each block of the answer, of at least one token, which grows from a
    random one to 1 over the updates."""
    start = torch.rand((), generator=keyed_generator(rollout.seed, 4)).double()
    share = start + (1 - start) * rollout.update / max(1, updates - 1)
    generator = keyed_generator(rollout.seed, 5, rollout.update)
    return open_slots(answer, block, share.expand(int(block.max()) + 1), generator)[0]


def _trajectory(
    rollout: Rollout, answer: Tensor, block: Tensor, segments: int | None
) -> tuple[Tensor, Tensor]:
    """The states in which the rollout decided tokens, with all blocks advancing in parallel."""
    step = rollout.step
    written = torch.arange(len(step)) >= rollout.prompt
    rank = torch.full_like(step, len(step))  # never decided, so masked to the end
    for number in range(int(block.max()) + 1):
        inside = written & (block == number) & (step > 0)
        _, order = step[inside].unique(return_inverse=True)
        if segments is not None and len(order):
            order = order * segments // max(segments, int(order.max()) + 1)
        rank[inside] = order
    order = torch.arange(int(rank[answer].max()) + 1)[:, None]
    return written & (rank >= order), (answer & (rank == order)).double()


@dataclass(frozen=True)
class _Row:
    """The slots of a row: their tokens, positions, copies and blocks, and the last position that
    each reads in its clean copy, [S] each."""

    ids: Tensor
    pos: Tensor
    noisy: Tensor
    block: Tensor
    until: Tensor


def _shown(
    rollout: Rollout, rl: Rl, spec: Spec, noise: Noise
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What each view of a rollout shows, [V, T] ids; the weights of its tokens, [V, T]; and, if
    they are those of a bound over time, the times [V, T]. Both policies see the same draws. Images
    are always shown."""
    masked, weight = views(rollout, rl, spec)
    generator, image = keyed_generator(rollout.seed, 3), rollout.ids < 0
    ids = rollout.ids.clamp(min=0)
    if not (noise.free and rl.estimator == "elbo"):
        shown = noise.hide(ids.expand_as(masked), masked, generator)
        return shown.where(~image, rollout.ids), weight, None
    place = torch.arange(len(ids)) - rollout.prompt
    answer, after = (place >= 0) & (place < rollout.answer), place >= rollout.answer
    block = _blocks(rollout, spec)
    times, factor = bound_times(draw_times(rl.samples, int(block.max()) + 1, generator))
    t = times[:, block]
    drawn = [noise.draw(ids, answer, answer, x, x, generator)[0] for x in t]
    shown = noise.hide(torch.stack(drawn), after.expand_as(t), generator)
    shown = shown.where(~image, rollout.ids)
    return shown, factor[:, block] * answer / len(t), t


def _lay_out(
    rollout: Rollout, shown: Tensor, spec: Spec, ar: bool
) -> tuple[list[_Row], Tensor, Tensor]:
    """Rows that hold the views of a rollout; the slot [V, T, 2] (row, column) at which each token
    is read; and its own slot. With blocks, all views share one row, [view 1 | view 2 | ... |
    clean]; with `full` attention, each view has its own row."""
    ids, count = rollout.ids, len(rollout.ids)
    pos = torch.arange(count)
    zero, until = torch.zeros_like(pos), until_of(ids, spec.images or "causal", rollout.prompt)
    if ar or spec.attention == "full":
        column = reading_slot(pos[None], "full", None, "shift" if ar else spec.prediction)
        column = column.expand(len(shown), -1)
        row = torch.arange(len(shown))[:, None].expand_as(column)
        noisy = torch.full((count,), not ar)
        slots = (torch.stack([row, x.expand_as(row)], -1) for x in (column, pos))
        return [_Row(view, pos, noisy, zero, until) for view in shown], *slots
    grid = spec.block_length
    first = rollout.prompt // grid * grid
    size, clean = count - first, (count - first) * len(shown)
    number = torch.arange(len(shown))[:, None]
    own = (number * size + pos - first).clamp(min=0)
    column = reading_slot(pos, spec.attention, grid, spec.prediction, own=own, clean=clean + pos)
    blocks = (pos[first:] // grid + number * count).flatten()
    row = _Row(
        ids=torch.cat([shown[:, first:].flatten(), ids]),
        pos=torch.cat([pos[first:].repeat(len(shown)), pos]),
        noisy=torch.arange(clean + count) < clean,
        block=torch.cat([blocks, zero - 1]),
        until=torch.cat([pos[first:].repeat(len(shown)), until]),
    )
    slots = (torch.stack([torch.zeros_like(x), x], -1) for x in (column, own))
    return [row], *slots


def score(
    model: Any,
    rollouts: Sequence[Rollout],
    rl: Rl,
    spec: Spec,
    suppressed: Tensor,
    inner: Any = None,
    width: int = 0,
    images: Images | None = None,
) -> Scores:
    """Score rollouts in one forward pass.

    Args:
        model: the causal LM, or a wrapper around it. inner: the causal LM, if `model` is a wrapper.
        suppressed: [V] bool, ids that the sampler never writes; [N, V] if they differ between the
            N tokens that are scored.
        width: width of the result, if larger than the length of the longest answer.
        images: those whose codes are among the ids of the rollouts; None: there are none.
    """
    inner, device = inner or model, suppressed.device
    if images is not None:
        rollouts = [replace(rollout, ids=images.numbered(rollout.ids)) for rollout in rollouts]
    rows: list[_Row] = []
    slots_of, weights, found, states, texts = [], [], [], [], []
    barred = suppressed if suppressed.dim() == 1 else suppressed.all(0)
    noise = spec.noise.on(spec.mask_token_id, barred)
    for number, rollout in enumerate(rollouts):
        shown, weight, t = _shown(rollout, rl, spec, noise)
        held, slot, own = _lay_out(rollout, shown, spec, rl.estimator == "ar")
        view, pos = (weight > 0).nonzero(as_tuple=True)
        place, target = pos - rollout.prompt, rollout.ids[pos]
        found.append(torch.stack([torch.full_like(view, number), view, place, target]))
        slots_of.append(slot[view, pos] + torch.tensor([len(rows), 0]))
        weights.append(weight[view, pos])
        if noise.free and rl.estimator != "ar":
            t = torch.ones(shown.shape).double() if t is None else t
            at = (own[view, pos] + torch.tensor([len(rows), 0])).T.double()
            states.append(torch.stack([shown[view, pos].double(), t[view, pos], *at]))
        rows += held
        texts += [rollout.ids] * len(held)
    numbers = torch.cat([torch.cat(found, 1), torch.cat(slots_of).T])
    last_view, last_place = numbers[1:3].amax(1).tolist()
    row, view, place, target, *at = _upload(numbers, device)
    ids, pos, noisy, block, until, doc = _upload(_stack(rows), device)
    noisy, places = noisy.bool(), _places(unwrapped(inner), rows, texts, images)
    start = pos // spec.block_length * spec.block_length if spec.block_length else pos * 0
    task = Task(
        input_ids=ids,
        slots=Slots(
            doc,
            pos,
            noisy,
            start,
            block,
            until=None if spec.images in (None, "causal") or spec.attention == "full" else until,
        ),
        attention=spec.attention,
        block_length=spec.block_length,
        index=at[0] * ids.shape[1] + at[1],
        target=target,
        places=None if places is None else _upload(places, device),
        images=images,
    )
    if states:
        shown, t, *slot = torch.cat(states, 1).to(device)
        own = (slot[0] * ids.shape[1] + slot[1]).long()
        task = seen(task, noise, own, shown.long(), t)
    inputs = task.inputs(inner, spec.local_window)
    with seeing(task.images):
        logits = output_at(model, task.index, inner=inner, **inputs).logits[0]
    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    logits = logits / rl.sampler.get("temperature", 1.0)
    logp = logits.masked_fill(suppressed, float("-inf")).log_softmax(-1)
    entropy = -(logp.exp() * logp.masked_fill(suppressed, 0.0)).sum(-1)
    if noise.free and rl.estimator == "elbo":
        own = -free_nats(noise, logits, target, task.shown, t, barred)
    else:
        own = logp.gather(1, target[:, None])[:, 0]
    return Scores(
        logp=own.to(logp),
        entropy=entropy.detach(),
        row=row,
        view=view,
        place=place,
        weight=_upload(torch.cat(weights), device).to(logp),
        shape=(len(rollouts), last_view + 1, max(width, last_place + 1)),
    )


def _places(
    model: Any, rows: Sequence[_Row], texts: Sequence[Tensor], images: Images | None
) -> Tensor | None:
    """[B, S, 3] the model's positions of the slots of rows, where it has any of its own.

    Args:
        texts: [T] the ids of which each row holds copies.
    """
    if images is None or not has_places(model):
        return None
    pairs = zip(rows, texts, strict=True)
    return pad_sequence([places_of(ids, images)[row.pos] for row, ids in pairs], True)


def _stack(rows: Sequence[_Row]) -> Tensor:
    """[6, B, S] ids, positions, copies, blocks, reaches and documents of the padded rows."""
    columns = [
        [getattr(row, name).long() for row in rows]
        for name in ("ids", "pos", "noisy", "block", "until")
    ]
    columns.append([torch.zeros_like(row.pos) for row in rows])
    fill = (0, 0, 0, 0, 0, PADDING)
    return torch.stack([pad_sequence(c, True, f) for c, f in zip(columns, fill, strict=True)])


def _upload(values: Tensor, device: torch.device) -> Tensor:
    """Values from the CPU on a device; a GPU copies them while the host goes on."""
    if device.type == "cuda":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)
