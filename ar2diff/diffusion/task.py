"""One forward pass, and the slots in it that predict tokens: what losses, likelihoods and
estimators have in common."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..core.attention import Slots, lay_out, model_mask, reading_slot
from ..core.head import UNKNOWN
from ..core.images import Images
from ..core.noise import Noise
from ..core.spec import Spec


@dataclass(frozen=True)
class Task:
    """A forward pass and what it predicts.

    Attributes:
        input_ids: [B, S] token ids.
        slots: the document, position and block of each token.
        attention, block_length, reveal: the rule of the attention mask, as `model_mask` takes it.
        index: [N] slots, in the flattened [B * S], whose logits predict a token.
        target: [N] the tokens that are predicted there.
        previous: [N] for a diffusion head, the tokens before them, `UNKNOWN` where masked.
        shown: [N] for a free noise, what their own slots show; [N, H] where that is vectors.
        vectors: [M, H] the embeddings of ids below 0: -1 is the first.
        places: [B, S, 3] the model's positions of the slots, if these are not the logical ones.
        images: those whose features are the ids below 0.
    """

    input_ids: Tensor
    slots: Slots
    attention: str
    block_length: int | None
    index: Tensor
    target: Tensor
    reveal: Tensor | None = None
    previous: Tensor | None = None
    shown: Tensor | None = None
    vectors: Tensor | None = None
    places: Tensor | None = None
    images: Images | None = None

    def inputs(self, model: Any, local_window: str | None) -> dict[str, Any]:
        """Keyword arguments of the model's forward.

        Args:
            model: the causal LM, not wrapped. local_window: the value in the spec.
        """
        mask = model_mask(
            model, self.slots, self.attention, self.block_length, local_window, self.reveal
        )
        return {
            "input_ids": self.input_ids,
            "attention_mask": mask,
            "position_ids": self.slots.pos if self.places is None else self.places.permute(2, 0, 1),
            **({} if self.vectors is None else {"vectors": self.vectors}),
        }


def places_of(wanted: Tensor) -> Tensor:
    """[N] places of the wanted tokens in a flattened batch, in row-major order.

    How many there are must be known before anything of that size is allocated, so on a GPU the host
    waits here for the device. Collators, which run on the CPU, therefore find the places for a
    training step.

    Args:
        wanted: [B, L] bool.
    """
    return wanted.flatten().nonzero()[:, 0]


def slots_at(columns: Tensor, places: Tensor, width: int) -> Tensor:
    """[N] slots in a flattened [B * width] batch that predict tokens.

    Args:
        columns: [B, L], the slot within the row at which each token is predicted.
        places: [N] of the tokens to predict, in the flattened [B * L].
        width: slots per row.
    """
    return places // columns.shape[1] * width + columns.flatten()[places]


def reading(task: Task, columns: Tensor, places: Tensor, tokens: Tensor) -> Task:
    """A forward pass that predicts other tokens than `task` does.

    Args:
        columns, places: as for `slots_at`. tokens: [B, L], the tokens themselves.
    """
    index = slots_at(columns, places, task.input_ids.shape[1])
    return replace(task, index=index, target=tokens.flatten()[places])


def masked_task(
    x0: Tensor,
    xt: Tensor,
    masked: Tensor,
    doc: Tensor,
    pos: Tensor,
    spec: Spec,
    *,
    attention: str | None = None,
    block_length: int | None = None,
    reveal: Tensor | None = None,
    drawn: Tensor | None = None,
    places: Tensor | None = None,
) -> Task:
    """The task of predicting every masked token of noised documents.

    Args:
        x0, xt, doc, pos: [B, L] clean ids, noised ids, documents, logical positions.
        masked: [B, L] bool (never position 0 of a document).
        attention, block_length: for an anneal, which differs from the spec; if `attention` is None,
            both are those of the spec.
        reveal: look-ahead edges that an anneal reveals.
        drawn: for a diffusion head, [B, L] bool, tokens that are predicted as if their left
            neighbour had been drawn just before them.
        places: [N] those of the masked tokens in the flattened batch; None finds them.
    """
    places = places_of(masked) if places is None else places
    if attention is None:
        attention, block_length = spec.attention, spec.block_length
    input_ids, slots = lay_out(xt, x0, doc, pos, attention)
    columns = reading_slot(pos, attention, block_length, spec.prediction)
    index = slots_at(columns, places, input_ids.shape[1])
    previous = None
    if spec.head is not None:
        previous = previous_ids(x0, masked, pos, block_length, drawn).flatten()[places]
    target = x0.flatten()[places]
    return Task(input_ids, slots, attention, block_length, index, target, reveal, previous)


def seen(task: Task, noise: Noise, own: Tensor, shown: Tensor, t: Tensor) -> Task:
    """The task with what its predicted tokens show in their own slots.

    Args:
        own: [N] these slots, in the flattened [B * S]. shown: [N] the ids there. t: [N] times.
    """
    if not noise.vectors:
        return replace(task, shown=shown)
    ids = task.input_ids.flatten()
    drawn, x = ids < 0, noise.state(shown, task.target, t)
    states, number = noise.state(ids[drawn]), drawn.cumsum(0) - 1
    states[number[own]] = x
    ids = torch.where(drawn, -1 - number, ids).view_as(task.input_ids)
    return replace(task, input_ids=ids, shown=x, vectors=noise.embedded(states))


def guessing(task: Task, noise: Noise, own: Tensor, tokens: Tensor, where: Tensor) -> Task:
    """The task with guesses of its tokens [N] in some of their own slots.

    Args:
        own: as of `seen`. where: [N] bool.
    """
    ids = task.input_ids.flatten().clone()
    if not noise.vectors:
        ids[own] = noise.with_guesses(ids[own], tokens, where)
        return replace(task, input_ids=ids.view_as(task.input_ids))
    x, vectors = noise.with_guesses(task.shown, tokens, where), task.vectors.clone()
    vectors[-1 - ids[own]] = noise.embedded(x)
    return replace(task, shown=x, vectors=vectors)


def clean_task(x0: Tensor, doc: Tensor, pos: Tensor) -> Task:
    """The forward pass of an AR model that reads documents [B, L]: their clean copy alone, of which
    no token is masked. `reading` makes it predict tokens."""
    none = torch.zeros(0, dtype=torch.long, device=x0.device)
    plain = Slots(doc, pos, torch.zeros_like(doc, dtype=torch.bool))
    return Task(x0, plain, "causal_context", 1, none, none)


def previous_ids(
    x0: Tensor, masked: Tensor, pos: Tensor, block_length: int | None, drawn: Tensor | None = None
) -> Tensor:
    """[B, L] the token before each one, or `UNKNOWN` where that is masked in the same block: a
    clean copy shows the blocks before. Arguments as of `masked_task`."""
    known = ~masked.roll(1, 1)
    if block_length is not None:
        known |= pos % block_length == 0
    if drawn is not None:
        known |= drawn
    return torch.where(known & (pos > 0), x0.roll(1, 1), UNKNOWN)


def turn_task(batch: dict[str, Tensor], spec: Spec) -> Task:
    """The task of predicting the masked tokens of a batch from `TurnCollator`."""
    places, target = batch["scored_at"], batch["target"]
    slots = Slots(*(batch[name] for name in ("doc", "pos", "noisy", "start", "block")))
    return Task(
        input_ids=batch["input_ids"],
        slots=replace(slots, until=batch.get("until")),
        attention=spec.attention,
        block_length=spec.block_length,
        index=slots_at(batch["reads"], places, target.shape[1]),
        target=target.flatten()[places],
        previous=batch["previous"].flatten()[places] if spec.head is not None else None,
        places=batch.get("places"),
        images=batch.get("images"),
    )


def columns_before(target: Tensor) -> Tensor:
    """[B, S] the slot before each one, which predicts it from left to right."""
    return torch.arange(-1, target.shape[1] - 1, device=target.device).expand_as(target)
