"""Completions to be judged and scored, with the canvas on which they were written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.model import Checkpoint
from ..config.rl import Rl
from ..core.canvas import Canvas
from ..core.seeds import content_key
from ..core.spec import Spec
from ..generation.complete import begin, settings_of


@dataclass(frozen=True)
class Rollout:
    """A completion on its canvas.

    Attributes:
        ids: [T] from position 0 to the end of the canvas, with masks where nothing was decided and
            codes where images are.
        prompt: length of the prompt. answer: length of the answer, including its end token.
        step: [T] the forward pass in which each token was decided, 0 for the others.
        seed: seed of all noise used to score the completion.
        forwards: how many forward passes the completion took.
        update: which of the updates on it is to be made, for an estimator that scores it in another
            way each time.
    """

    ids: Tensor
    prompt: int
    answer: int
    step: Tensor
    seed: int
    forwards: int = 0
    update: int = 0

    @property
    def answer_ids(self) -> list[int]:
        """The token ids of the completion."""
        return self.ids[self.prompt : self.prompt + self.answer].tolist()


def sampler_settings(rl: Rl) -> dict[str, Any]:
    """The options for `generate` with which completions are written."""
    mode = "diffusion"
    if rl.estimator == "ar":
        mode = "ar" if rl.draft is None else "speculative"
    return {
        "temperature": 1.0, "max_new_tokens": rl.max_completion_length, "mode": mode, **rl.sampler,
    }  # fmt: skip


def sample(
    checkpoint: Checkpoint,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    settings: dict[str, Any],
    batch_size: int,
    album: Any = None,
) -> list[Rollout]:
    """Complete each prompt, in batches of similar length. Results are in the order of the prompts.

    Args:
        prompts: token ids, and codes of images.
        seeds: one per prompt; the draws for a row depend only on its seed and prompt.
        settings: options for `generate`.
        album: has `images_in`, as an `Album`; None: that of the checkpoint.
    """
    found: dict[int, Rollout] = {}
    order = sorted(range(len(prompts)), key=lambda n: len(prompts[n]))
    for first in range(0, len(order), batch_size):
        numbers = order[first : first + batch_size]
        own = tuple(content_key([seeds[n], 1]) % 2**62 for n in numbers)
        spec, options = settings_of(checkpoint, {**settings, "seed": own})
        rows = [prompts[n] for n in numbers]
        canvas, states = begin(checkpoint, spec, options, rows, album=album)
        for _ in states:
            pass
        for row, number in enumerate(numbers):
            found[number] = of_canvas(canvas, row, spec, seeds[number])
            own = torch.as_tensor(prompts[number])
            found[number].ids[: len(own)][own < 0] = own[
                own < 0
            ]  # where the canvas has placeholders
    return [found[number] for number in range(len(prompts))]


def of_canvas(canvas: Canvas, row: int, spec: Spec, seed: int) -> Rollout:
    """The rollout in a row of a finished canvas. With blocks, its canvas ends with the block of the
    last token, since nothing after it was ever read."""
    prompt, answer = int(canvas.prompt[row]), len(canvas.new_ids(row))
    stop = int(canvas.length[row])
    if spec.attention != "full":
        stop = -(-(prompt + answer) // spec.block_length) * spec.block_length
    return Rollout(
        ids=canvas.ids[row, :stop].clone(),
        prompt=prompt,
        answer=answer,
        step=canvas.step[row, :stop].clone(),
        seed=seed,
        forwards=int(canvas.forwards[row]),
    )
