"""Likelihood: the exact-k bound on -log p(x0) with its Monte Carlo error, and the AR mode's NLL.

For a block of n tokens

    -log p(x) <= E_{k ~ U{1..n}} E_{|S|=k} (n/k) sum_{i in S} -log p(x_i | x_notS),

which averages the chain rule over all orders (LLaDA, Nie et al. 2025, eq. 6). The bound for a row
is the sum over its blocks, each given the clean blocks before it. The draws of a block are
stratified in k; a block with few tokens is enumerated, if its open slots show masks.

The clean context is read once for all draws, and what it predicts is a control variate: with b_i,
what a token costs the causal model, a draw only has to estimate the sum of
-log p(x_i | x_notS) - b_i, which is 0 for the first token of a block that is read from the context.

A noise in the free form has another bound, the integral over time of `Noise.nats`, in which every
slot counts. Its draws are stratified in time.

With a diffusion head, p(x_i | x_notS) is softmax(U_i + W1[x_{i-1}] W2) where x_{i-1} is visible,
and softmax(U_i) where it is masked: what the sampler draws a token from that it decides alone. The
bound is thus that of drawing one token at a step, in random order. It reads no masked token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from ..core.attention import PADDING, Slots, model_mask
from ..core.forward import logits_at
from ..core.head import head_of
from ..core.images import Images, image_token_of, seeing
from ..core.noise import EARLIEST, Noise
from ..core.seeds import keyed_generator
from ..core.sight import Sight
from ..core.spec import Spec
from .cross_entropy import PART, cross_entropy, loss_of_logits, rows_at_once
from .draws import Draws, draw
from .estimate import Estimate
from .task import Task, masked_task, places_of, previous_ids, seen, slots_at


@torch.no_grad()
def bound(
    model: Any,
    spec: Spec,
    rows: Sequence[Sequence[int]],
    suppressed: Tensor,
    samples: int = 8,
    seed: int = 0,
    batch_size: int = 32,
    starts: Sequence[int] | None = None,
) -> Estimate:
    """Upper bound on each row's -log p, given its first token.

    Args:
        model: in eval mode.
        rows: token ids, each row one document from its first token.
        suppressed: [V] bool, from `objective.suppressed_ids`.
        samples: noise draws per row. They depend only on the seed and the row's ids, or on those
            before its start, so that several continuations of one context share them.
        batch_size: masked copies per forward pass; each row to score takes `samples` of them.
        starts: for each row, the first token that is scored, given all before it; None: the second.
    """
    starts = starts or [1] * len(rows)
    judged = [scored(row, suppressed, start) for row, start in zip(rows, starts, strict=True)]
    noise = spec.noise.on(spec.mask_token_id, suppressed)
    read = partial(_read_free, noise) if noise.free else _read
    draws = [
        draw(noise, row, spec.block_length, maskable, samples, seed, start)
        for row, maskable, start in zip(rows, judged, starts, strict=True)
    ]
    exact, drawn = [], []
    per_forward = max(1, batch_size // samples)
    for first in range(0, len(rows), per_forward):
        part = slice(first, first + per_forward)
        found = read(model, spec, rows[part], judged[part], draws[part], suppressed)
        for row, (known, values) in zip(draws[part], found, strict=True):
            enumerated, estimates = row.sums(values, samples)
            exact.append(known.sum() + enumerated)
            drawn.append(estimates)
    tokens = torch.tensor([float(row.sum()) for row in judged])
    return Estimate.of_draws(torch.stack(exact), drawn, tokens)


def scored(row: Sequence[int], suppressed: Tensor, start: int = 1) -> Tensor:
    """[L] bool, which tokens are scored: those from `start`, but for suppressed ids such as the
    mask, and for images."""
    ids = torch.tensor(row)
    return (torch.arange(len(row)) >= start) & (ids >= 0) & ~suppressed[ids.clamp(min=0)]


def _read(
    model: Any,
    spec: Spec,
    rows: Sequence[Sequence[int]],
    judged: Sequence[Tensor],
    draws: Sequence[Draws],
    suppressed: Tensor,
) -> list[tuple[Tensor, Tensor]]:
    """For each row, what its tokens cost whatever is masked, [L], and what each of its masked
    tokens costs beyond that, [D, L]; double, on the CPU."""
    length, copies = max(map(len, rows)), max(len(row.masked) for row in draws)
    x0 = torch.zeros(len(rows), length, dtype=torch.long)
    doc, wanted = torch.full_like(x0, PADDING), torch.zeros_like(x0, dtype=torch.bool)
    masked = torch.zeros(len(rows), copies, length, dtype=torch.bool)
    xt = torch.zeros(masked.shape, dtype=torch.long)
    for r, row in enumerate(rows):
        x0[r, : len(row)], doc[r, : len(row)] = torch.tensor(row), 0
        wanted[r, : len(row)] = judged[r]
        masked[r, : len(draws[r].masked), : len(row)] = draws[r].masked
        xt[r, : len(draws[r].masked), : len(row)] = draws[r].xt
    pos = torch.arange(length).expand_as(x0)
    known = torch.zeros(x0.shape, dtype=torch.double)
    values = torch.zeros(masked.shape, dtype=torch.double)
    if spec.attention == "full":
        copied = (x.repeat_interleave(copies, 0) for x in (x0, masked[:, 0], doc, pos))
        x0, _, doc, pos = copied
        nll = masked_nll(
            model, spec, x0, masked.flatten(0, 1), doc, pos, suppressed, xt.flatten(0, 1)
        )
        values[masked] = nll.double()
    else:
        opens = (pos % spec.block_length == 0) & (pos > 0) & (spec.prediction == "shift")
        given = wanted if spec.attention == "causal_context" else wanted & opens
        cache, nll = _read_context(model, spec, x0, given, doc, pos, suppressed)
        known[given] = nll.double()
        hidden = masked & ~opens[:, None]  # the others are read in the context, and known
        nll = _read_blocks(model, spec, cache, x0, xt, masked, hidden, doc, pos, suppressed)
        values[hidden] = nll.double() - known[:, None].expand_as(values)[hidden]
    return [
        (known[r, : len(row)], values[r, : len(draws[r].masked), : len(row)])
        for r, row in enumerate(rows)
    ]


def _read_free(
    noise: Noise,
    model: Any,
    spec: Spec,
    rows: Sequence[Sequence[int]],
    judged: Sequence[Tensor],
    draws: Sequence[Draws],
    suppressed: Tensor,
) -> list[tuple[Tensor, Tensor]]:
    """As `_read`, of a noise in the free form: what each slot of each draw adds to the bound."""
    length, copies = max(map(len, rows)), len(draws[0].xt)
    x0, xt = torch.zeros(2, len(rows), copies, length, dtype=torch.long)
    doc, wanted = torch.full_like(x0, PADDING), torch.zeros(x0.shape, dtype=torch.bool)
    t = torch.ones(x0.shape, dtype=torch.double)
    for r, row in enumerate(rows):
        here = (r, slice(None), slice(len(row)))
        x0[here], doc[here] = torch.tensor(row), 0
        xt[here], wanted[here], t[here] = draws[r].xt, draws[r].masked, draws[r].t
    pos = torch.arange(length).expand_as(x0)
    task = masked_task(
        *(x.flatten(0, 1).to(model.device) for x in (x0, xt, wanted, doc, pos)), spec
    )
    x, t = (y[wanted].to(model.device) for y in (xt, t))
    places = places_of(wanted.flatten(0, 1))
    own = places // length * task.input_ids.shape[1] + places % length  # the noisy copy is first
    task = seen(task, noise, own.to(model.device), x, t)
    logits = logits_at(model, task.index, **task.inputs(model, spec.local_window))
    values = torch.zeros(x0.shape, dtype=torch.double)
    values[wanted] = free_nats(noise, logits, task.target, task.shown, t, suppressed).cpu()
    return [
        (torch.zeros(len(row), dtype=torch.double), values[r, :, : len(row)])
        for r, row in enumerate(rows)
    ]


def free_nats(
    noise: Noise, logits: Tensor, x0: Tensor, x: Tensor, t: Tensor, suppressed: Tensor
) -> Tensor:
    """[N] double, `Noise.nats` given the model's logits [N, V], a few rows at a time."""
    suppressed, size = suppressed.to(logits.device), rows_at_once(logits.shape[1], "cpu", PART)
    found = []
    for part in (slice(i, i + size) for i in range(0, len(logits), size)):
        own = logits[part].double().masked_fill(suppressed, float("-inf"))
        at = t[part].double().clamp(EARLIEST, 1 - EARLIEST)
        own = noise.others(own, x[part], at)
        found.append(noise.nats(own, x0[part], x[part], at))
    return torch.cat(found) if found else logits.new_zeros(0, dtype=torch.double)


def _read_context(
    model: Any, spec: Spec, x0: Tensor, given: Tensor, doc: Tensor, pos: Tensor, suppressed: Tensor
) -> tuple[DynamicCache, Tensor]:
    """The keys of the clean rows, and -log p of the tokens `given` ([R, L] bool) after the tokens
    before them, [N] on the CPU."""
    device, cache = model.device, DynamicCache()
    previous = torch.where(pos > 0, x0.roll(1, 1), 0)[given].to(device)
    x0, given, doc, pos = (x.to(device) for x in (x0, given, doc, pos))
    slots = Slots(doc, pos, torch.zeros_like(given))
    index = slots_at(pos - 1, places_of(given), x0.shape[1])
    task = Task(x0, slots, spec.attention, spec.block_length, index, x0[given], previous=previous)
    logits = logits_at(model, index, cache=cache, **task.inputs(model, spec.local_window))
    return cache, _nll(model, spec, logits, task, suppressed)


def _read_blocks(
    model: Any,
    spec: Spec,
    cache: DynamicCache,
    x0: Tensor,
    xt: Tensor,
    masked: Tensor,
    hidden: Tensor,
    doc: Tensor,
    pos: Tensor,
    suppressed: Tensor,
) -> Tensor:
    """-log p of the tokens `hidden` in masked copies of blocks after their context, [N] on the CPU.

    Args:
        cache: of the clean rows; it is used up.
        x0, doc, pos: [R, L]. xt: [R, D, L] ids. masked, hidden: [R, D, L] bool.
    """
    if not hidden.any():
        return torch.zeros(0)
    _, copies, length = masked.shape
    size, device = spec.block_length, model.device
    first = int(masked.any(0).any(0).nonzero()[0]) // size * size  # no block before it is masked
    cache.batch_repeat_interleave(copies)
    x0, doc, pos = (x.repeat_interleave(copies, 0) for x in (x0, doc, pos))
    masked, hidden = masked.flatten(0, 1), hidden.flatten(0, 1)
    previous = previous_ids(x0, masked, pos, size)[hidden].to(device)
    target = x0[hidden].to(device)
    xt = xt.flatten(0, 1)[:, first:].to(device)
    doc, pos = (torch.cat([x, x[:, first:]], 1).to(device) for x in (doc, pos))
    noisy = (torch.arange(doc.shape[1], device=device) >= length).expand_as(doc)
    read = range(length, doc.shape[1])
    slots = Slots(doc, pos, noisy)
    mask = model_mask(model, slots, spec.attention, size, spec.local_window, queries=read)
    columns = torch.arange(len(read)).expand(len(x0), -1) - int(spec.prediction == "shift")
    index = slots_at(columns, places_of(hidden[:, first:]), len(read)).to(device)
    task = Task(xt, slots, spec.attention, size, index, target, previous=previous)
    logits = logits_at(
        model, index, cache=cache, input_ids=xt, attention_mask=mask,
        position_ids=pos[:, length:],
    )  # fmt: skip
    return _nll(model, spec, logits, task, suppressed)


def _nll(model: Any, spec: Spec, logits: Tensor, task: Task, suppressed: Tensor) -> Tensor:
    """-log p of what a forward predicts, [N] on the CPU."""
    head = head_of(model, spec)
    if head is not None and task.previous is not None:
        logits = logits + head(task.previous).to(logits)
    return cross_entropy(logits, task.target, suppressed.to(model.device)).cpu()


def masked_nll(
    model: Any, spec: Spec, x0: Tensor, masked: Tensor, doc: Tensor, pos: Tensor,
    suppressed: Tensor, xt: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """-log p(x0_i | xt) of every masked token, [N] in row-major order, on the CPU.

    Args:
        x0, doc, pos: [B, L]; masked: [B, L] bool (never position 0).
        xt: [B, L] what is shown; None: what the noise shows at t = 1 in the masked slots.
    """
    device = model.device
    if xt is None:
        noise = spec.noise.on(spec.mask_token_id, suppressed)
        xt = noise.hide(x0.cpu(), masked.cpu(), keyed_generator(0))
    x0, xt, masked, doc, pos = (x.to(device) for x in (x0, xt, masked, doc, pos))
    task = masked_task(x0, xt, masked, doc, pos, spec)
    return task_nll(model, spec, task, suppressed)


def task_nll(model: Any, spec: Spec, task: Task, suppressed: Tensor) -> Tensor:
    """-log p of each token that a task predicts, [N], on the CPU; with the bias of the diffusion
    head where the task knows the tokens before."""
    with seeing(task.images):
        logits = logits_at(model, task.index, **task.inputs(model, spec.local_window))
    return _nll(model, spec, logits, task, suppressed)


@torch.no_grad()
def ar_nll(
    model: Any,
    rows: Sequence[Sequence[int]],
    suppressed: Tensor,
    local_window: str | None = None,
    batch_size: int = 32,
    starts: Sequence[int] | None = None,
    images: Images | None = None,
    reach: str = "causal",
) -> Estimate:
    """Exact -log p of each row from left to right, given its first token, under an AR model or
    mode.

    Args:
        starts: for each row, the first token that is scored, given all before it; None: the second.
        images: those whose codes are among the ids. reach: as of `until_of`, where what precedes
            the first token that is scored is the prompt.
    """
    starts = starts or [1] * len(rows)
    judged = [scored(row, suppressed, start) for row, start in zip(rows, starts, strict=True)]
    nats, greedy = [], []
    for first in range(0, len(rows), batch_size):
        part = slice(first, first + batch_size)
        some = _read_by(model, rows[part], starts[part], images, reach)
        found, right = _ar_part(model, rows[part], judged[part], suppressed, local_window, some)
        nats.append(found)
        greedy.append(right)
    nats = torch.cat(nats)
    tokens = torch.tensor([float(row.sum()) for row in judged])
    return Estimate.exact(nats, tokens, torch.cat(greedy))


def _ar_part(
    model: Any,
    rows: Sequence[Sequence[int]],
    judged: Sequence[Tensor],
    suppressed: Tensor,
    local_window: str | None,
    sight: Sight | None = None,
) -> tuple[Tensor, Tensor]:
    """Rows of one forward: [R] -log p of their judged tokens, and whether each of those is the
    likeliest. A last token is judged but not read, so that a row may have a token more than the
    context."""
    length = max(map(len, rows))
    x0 = torch.tensor([[*row, *[0] * (length - len(row))] for row in rows], device=model.device)
    wanted = torch.stack([torch.nn.functional.pad(j, (0, length - len(j))) for j in judged])
    wanted, read = wanted.to(model.device), max(1, length - 1)
    pos = torch.arange(length, device=model.device).expand_as(x0)
    real = pos < torch.tensor([len(row) for row in rows], device=model.device)[:, None]
    slots = Slots(torch.where(real, 0, PADDING), pos, torch.zeros_like(real))
    slots = Slots(*(x[:, :read] for x in (slots.doc, slots.pos, slots.noisy)))
    places = places_of(wanted)
    task = Task(
        x0[:, :read], slots, "causal_context", 1, slots_at(pos - 1, places, read), x0[wanted]
    )
    if sight is not None:
        task = _seeing(task, sight, read, image_token_of(model.config))
    with seeing(task.images):
        logits = logits_at(model, task.index, **task.inputs(model, local_window))
    ones = torch.ones(len(places), device=model.device)
    found = loss_of_logits(logits, task.target, ones, suppressed.to(model.device), len(places))
    nats = torch.zeros(x0.shape, dtype=torch.double, device=model.device)
    nats[wanted] = found.ce.double()
    right = torch.ones_like(wanted)
    right[wanted] = found.right
    return nats.sum(1).cpu(), right.all(1).cpu()


def _read_by(
    model: Any,
    rows: Sequence[Sequence[int]],
    starts: Sequence[int],
    images: Images | None,
    reach: str,
) -> Sight | None:
    """What rows see; None if no row has an image. Arguments as of `ar_nll`."""
    if images is None or not any(token < 0 for row in rows for token in row):
        return None
    ids = [images.numbered(torch.tensor(row)) for row in rows]
    return Sight.of_rows(model, images, ids, reach, prompts=starts)


def _seeing(task: Task, sight: Sight, read: int, mark: int) -> Task:
    """The task of reading the first tokens of rows with images. A placeholder (`mark`) that stands
    for no image, because a base wrote it, is read as another token, and never scored."""
    ids, device = sight.ids[:, :read], task.input_ids.device
    until = None if sight.until is None else sight.until[:, :read].clamp(max=read - 1).to(device)
    places = None if sight.places is None else sight.places[:, :read].to(device)
    words = task.input_ids.cpu()
    words = words.masked_fill(words == mark, 0)
    return replace(
        task,
        input_ids=torch.where(ids < 0, ids, words).to(device),
        slots=replace(task.slots, until=until),
        places=places,
        images=sight.images,
    )
