"""Noise from the sampler itself: batches whose blocks stand as the model found them while it wrote
a text of its own, halfway through being decided (OPDLM, 2606.06712).

In training the visible tokens of a block are a random subset; in decoding they are those that the
model was sure of, and its own. Here the model continues the first half of each document, and each
block contributes one state of its trajectory. Of several texts the likeliest can be kept, which is
the constrained order of Seed Diffusion (Song et al. 2025): trajectories of the model's own, chosen
by their bound.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import floor
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.model import Checkpoint
from ..config.recipe import Recipe
from ..core.attention import PADDING
from ..core.seeds import content_key, keyed_generator
from ..data.documents import Collator, blank_batch, edits_at
from ..diffusion.likelihood import bound
from .rollouts import Rollout, sample

DRAWS = 4  # of noise, for the bound of a text


def is_on_policy(recipe: Recipe, step: int) -> bool:
    """Whether an optimizer step trains on the model's own text: evenly spread over the steps after
    an anneal, and with the share that the recipe gives them."""
    share = recipe.noise.on_policy
    return step >= recipe.anneal.steps and floor((step + 1) * share) > floor(step * share)


@dataclass(frozen=True)
class Place:
    """A document in a batch: its row and columns, and how many of its tokens are the prompt."""

    row: int
    start: int
    stop: int
    prompt: int


def own_states(
    checkpoint: Checkpoint, collate: Collator, batch: dict[str, Tensor], eos: int
) -> dict[str, Tensor]:
    """A batch like the given one, with the second half of each document replaced by the model's
    own text, which ends at its end token, and with the noise of its trajectory. The AR loss stays
    on the first halves.

    A document's text and noise depend on the weights, the seed, the step and its prompt alone.

    Args:
        checkpoint: its model writes, one micro-batch at a time, and is in eval mode meanwhile.
        collate: the collator that made the batch.
        eos: what stands in the clean copy where the sampler decided nothing, behind an end token.
    """
    device, size, step = batch["x0"].device, collate.recipe.convert.block_length, batch["step"]
    views = 2 if edits_at(collate.recipe, step) else 1  # of which the second repeats the texts
    batch = {name: batch[name].chunk(views)[0].cpu() for name in ("x0", "doc", "ar")}
    seed = collate.recipe.train.seed
    shape = batch["x0"].shape
    made = blank_batch(shape) | {"ratio": torch.ones(shape, dtype=torch.double)}
    masked, t = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.double)
    best_of = collate.recipe.noise.best_of
    for place, rollout in _continued(checkpoint, batch, size, (seed, step), best_of):
        length = min(place.stop - place.start, len(rollout.ids))
        here = (place.row, slice(place.start, place.start + length))
        ids, at = rollout.ids[:length], torch.arange(length)
        decided = ids != collate.noise.mask
        written = (at >= place.prompt) & (at < place.prompt + rollout.answer)
        made["x0"][here] = torch.where(decided, ids, eos)
        made["doc"][here] = batch["doc"][here]
        made["pos"][here] = at
        made["weight"][here] = written.float()
        made["real"][here] = at < place.prompt
        if collate.noise.guesses:
            draws = collate.noise.guesses_for(length, keyed_generator(rollout.seed, 4))
            made["guess"][here] = draws
        masked[here], t[here] = drawn_state(
            rollout.step[:length], decided, written, size, rollout.seed
        )
    made["written"] = made["weight"] > 0
    xt = collate.noise.hide(made["x0"], masked)
    states = collate.finish(made, xt[None], masked[None], t[None], size)
    return {name: x.to(device) for name, x in states.items()} | {"step": step}


def _continued(
    checkpoint: Checkpoint,
    batch: dict[str, Tensor],
    size: int,
    key: tuple[int, int],
    best_of: int,
) -> list[tuple[Place, Rollout]]:
    """The documents of a batch, and the model's own continuations of their first halves: of each,
    the likeliest of `best_of`."""
    places: dict[int, list[Place]] = {}  # by the number of tokens to write
    for row in range(len(batch["doc"])):
        doc = batch["doc"][row]
        for number in doc[doc != PADDING].unique().tolist():
            columns = (doc == number).nonzero()[:, 0]
            start, stop = int(columns[0]), int(columns[-1]) + 1
            real = int(batch["ar"][row, columns].sum()) + 1
            prompt = max(1, real // 2 // size * size)
            places.setdefault(stop - start - prompt, []).append(Place(row, start, stop, prompt))
    found: list[tuple[Place, Rollout]] = []
    training = checkpoint.model.training
    checkpoint.model.eval()
    try:
        for new, group in places.items():
            prompts = [batch["x0"][p.row, p.start : p.start + p.prompt].tolist() for p in group]
            settings: dict[str, Any] = {
                "mode": "diffusion", "temperature": 1.0, "max_new_tokens": new,
            }  # fmt: skip
            tries = []
            for number in range(best_of):
                own = [number] if number else []
                seeds = [content_key([*key, *own, *prompt]) % 2**62 for prompt in prompts]
                with torch.no_grad():
                    tries.append(sample(checkpoint, prompts, seeds, settings, len(prompts)))
            found += zip(group, _likeliest(checkpoint, tries), strict=True)
    finally:
        checkpoint.model.train(training)
    return found


def _likeliest(checkpoint: Checkpoint, tries: list[list[Rollout]]) -> list[Rollout]:
    """Of several continuations of each prompt, [tries, prompts], those with the smallest bound on
    -log p, in nats per token."""
    if len(tries) == 1:
        return tries[0]
    nats = []
    for texts in tries:
        rows = [text.ids[: text.prompt + text.answer].tolist() for text in texts]
        starts = [text.prompt for text in texts]
        made = bound(
            checkpoint.model, checkpoint.spec, rows, checkpoint.suppressed, DRAWS, starts=starts
        )
        nats.append(made.nats / torch.tensor([text.answer for text in texts]))
    best = torch.stack(nats).argmin(0).tolist()
    return [tries[number][place] for place, number in enumerate(best)]


def drawn_state(
    step: Tensor, decided: Tensor, written: Tensor, size: int, seed: int
) -> tuple[Tensor, Tensor]:
    """[L] which tokens were masked before one of the forwards of each block, all of which are as
    likely, and [L] the share of the block's written tokens that were.

    Args:
        step: [L] the forward that decided a token. decided, written: [L] bool.
    """
    generator, prompt = keyed_generator(seed, 2), int(written.int().argmax())
    masked, t = torch.zeros_like(written), torch.zeros(len(step), dtype=torch.double)
    for first in range(prompt // size * size, len(step), size):
        block = slice(first, first + size)
        forwards = step[block][written[block]].unique()
        chosen = forwards[torch.randint(len(forwards), (), generator=generator)]
        later = (step[block] >= chosen) | ~decided[block]
        masked[block] = later & (torch.arange(first, first + len(later)) >= prompt)
        t[block] = (masked[block] & written[block]).sum().double() / written[block].sum()
    return masked, t
