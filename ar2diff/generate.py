"""Decoding: one loop for every attention, as an iterator of states that a screen can draw.

Plain: each step is a forward of the whole row, [clean context | noisy block], under the very mask
that training used.
This file is copied into converted folders: it imports torch and its neighbours alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .attention import Slots, model_mask
from .samplers import choose_tokens, over_threshold
from .spec import Spec

THRESHOLD = 0.9


@dataclass
class State:
    """A row while it is denoised.

    Attributes:
        ids: [S] prompt and canvas; undecided tokens hold the mask id.
        prompt: how many of them are the prompt.
        forwards: forwards taken so far.
        finished: nothing more will change; `new_ids` is the answer.
    """

    ids: Tensor
    prompt: int
    forwards: int
    new_ids: list[int]
    finished: bool = False


@torch.no_grad()
def denoise(
    model: Any,
    spec: Spec,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    suppressed: Tensor,
    eos: Sequence[int] = (),
    threshold: float = THRESHOLD,
    temperature: float = 0.0,
    seed: int = 0,
) -> Iterator[State]:
    """Denoise an answer to a prompt, yielding a state after every forward.

    Blocks stand on the grid of the training rows: they are counted from the prompt's first token,
    and prompt tokens that share a block with the answer stand clean in it. A canvas is filled to
    the end of its block whatever `max_new_tokens` is, as in training.

    Args:
        prompt: token ids, at least one.
        suppressed: [V] bool, ids that must not be written (the mask, rows without a token).
        eos: ids that end an answer; it is over once one stands and all before it is decided.
        threshold: commit tokens surer than this.
        temperature: 0 is greedy.
    """
    if not prompt:
        raise ValueError("the prompt has no token: position 0 is never predicted")
    if spec.mask_token_id in prompt:
        raise ValueError("the prompt holds the mask token")
    generator = torch.Generator().manual_seed(seed)
    total = len(prompt) + max_new_tokens
    size = spec.block_length or total
    ids = torch.tensor(list(prompt), device=model.device)
    suppressed, forwards = suppressed.to(model.device), 0
    while len(ids) < total:
        start = len(ids) // size * size
        end = start + size
        ids = torch.cat([ids, ids.new_full((end - len(ids),), spec.mask_token_id)])
        while (masked := ids == spec.mask_token_id).any():
            logits = masked_logits(model, spec, ids, start).masked_fill(suppressed, float("-inf"))
            forwards += 1
            tokens, confidence = choose_tokens(logits, temperature, generator)
            commit = over_threshold(confidence, threshold)
            ids[masked.nonzero()[:, 0][commit]] = tokens[commit]
            answer = _answer(ids, len(prompt), total, spec.mask_token_id, eos)
            yield State(ids.clone(), len(prompt), forwards, answer or [], answer is not None)
            if answer is not None:
                return


def masked_logits(model: Any, spec: Spec, ids: Tensor, start: int) -> Tensor:
    """Logits [N, V] of the masked tokens of one row: clean before `start`, noisy from there.

    Args:
        ids: [S], of which the masked ones lie at `start` or later.
    """
    pos = torch.arange(len(ids), device=ids.device)[None]
    noisy = torch.ones_like(pos, dtype=torch.bool) if spec.attention == "full" else pos >= start
    slots = Slots(torch.zeros_like(pos), pos, noisy)
    mask = model_mask(model, slots, spec.attention, spec.block_length, spec.local_window)
    logits = model(
        input_ids=ids[None], attention_mask=mask, position_ids=pos, use_cache=False
    ).logits[0]
    masked = (ids == spec.mask_token_id).nonzero()[:, 0]
    return logits[masked - int(spec.prediction == "shift")]


def _answer(
    ids: Tensor, prompt: int, total: int, mask_token_id: int, eos: Sequence[int]
) -> list[int] | None:
    """The finished answer (its EOS included), or None while something before its end is masked."""
    new = ids[prompt:total].tolist()
    decided = new.index(mask_token_id) if mask_token_id in new else len(new)
    for place, token in enumerate(new[:decided]):
        if token in eos:
            return new[: place + 1]
    return new if decided == total - prompt else None
