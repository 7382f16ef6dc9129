"""Likelihood of the answers in held-out conversations, each given what stands before it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import log, nan
from statistics import stdev

import torch
from accelerate.utils import send_to_device

from ..checkpoint.model import Checkpoint
from ..config.recipe import Recipe, with_values
from ..config.sections import Noise
from ..conversion.images import reach_in
from ..data.turns import ConversationPart, PackedConversations, TurnCollator
from ..diffusion.likelihood import bound, task_nll
from ..diffusion.objective import time_weights
from ..diffusion.task import columns_before, reading, turn_task
from .score import Bound, NegativeLogLikelihood, Score

ROWS = 8  # conversations that are read together


def collator_for(recipe: Recipe, checkpoint: Checkpoint, ghost: int | None = None) -> TurnCollator:
    """The collator of conversations for a checkpoint; `ghost` as of `TurnCollator`."""
    if not checkpoint.sees_images:
        return TurnCollator(recipe, checkpoint.noise)
    spec = checkpoint.spec
    reach = reach_in(checkpoint) if spec is None else spec.images
    return TurnCollator(recipe, checkpoint.noise, checkpoint.album, reach, ghost)


class AnswerJudge:
    """Scores the model of a checkpoint on the answers of conversations.

    The canvas of an answer is that of decoding: with blocks, its last one is filled with the end
    token. The bound is that of the whole canvas, and counts as nats per token of the answer, so it
    bounds the answer's own likelihood from above.

    Args:
        conversations: the rows of the run. numbers: of those to judge.
        samples: noise draws of each answer.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        conversations: PackedConversations,
        numbers: Iterable[int],
        samples: int,
    ):
        recipe = conversations.recipe
        noise = Noise(time="block" if recipe.convert.block_length else "document")
        plain = with_values(recipe, noise=noise.model_dump(), objective={"distil": None})
        self.checkpoint, self.samples = checkpoint, samples
        self.collate = collator_for(plain, checkpoint)
        rows, draws = list(numbers), range(samples)
        self.parts = [
            [_unfilled(part, plain) for n in rows for part in conversations.parts(n, draw)]
            for draw in draws
        ]

    @property
    def rows(self) -> list[list[int]]:
        """Token ids of the judged conversations."""
        return [part.ids for part in self.parts[0]]

    @torch.no_grad()
    def __call__(self) -> Score:
        """Score the answers; what the model does not have, a mode or a spec, is None."""
        spec, totals, ar = self.checkpoint.spec, [], nan
        for draw, parts in enumerate(self.parts):
            sums = [self._nats(parts[n : n + ROWS], not draw) for n in range(0, len(parts), ROWS)]
            total, left_to_right = torch.tensor(sums, dtype=torch.double).sum(0).tolist()
            totals.append(total)
            ar = ar if draw else left_to_right
            if spec is None or spec.noise.free:
                break
        if spec is not None and spec.noise.free:
            totals = [] if self.unmeasured else self._free_totals()
        turns = [(part, turn) for part in self.parts[0] for turn in part.turns]
        tokens = sum(turn.end - turn.start for _, turn in turns)
        tokenizer = self.checkpoint.tokenizer
        texts = tokenizer.batch_decode(
            [part.ids[turn.start : turn.end] for part, turn in turns], skip_special_tokens=True
        )
        size = len("".join(texts).encode())

        def bits(nats: float) -> float:
            return nats / size / log(2) if size else nan

        judged = nll = None
        if spec is not None and totals:
            mean = sum(totals) / len(totals)
            error = stdev(totals) / len(totals) ** 0.5 / tokens if len(totals) > 1 else None
            judged = Bound(mean / tokens, error, bits(mean))
        if self._reads_left_to_right:
            nll = NegativeLogLikelihood(ar / tokens, bits(ar))
        return Score(tokens, size, judged, nll)

    @property
    def unmeasured(self) -> str:
        """What is not measured, and why; empty if all is."""
        spec = self.checkpoint.spec
        if spec is not None and spec.noise.free and any(min(ids) < 0 for ids in self.rows):
            return f"the bound is not measured: it has no images under the noise {spec.noise.kind}"
        return ""

    @property
    def _reads_left_to_right(self) -> bool:
        spec = self.checkpoint.spec
        return spec is None or (spec.ar_mode and spec.attention != "full")

    def _nats(self, parts: Sequence[ConversationPart], first: bool) -> tuple[float, float]:
        """Nats of the answers of some conversations: one draw of the bound, and from left to right
        if this is the `first` draw; 0 for what is not computed."""
        model, spec = self.checkpoint.model, self.checkpoint.spec_or_causal
        batch = self.collate([(number, [part]) for number, part in enumerate(parts)])
        batch = send_to_device(batch, model.device)  # but for images, which go there when needed
        suppressed = self.checkpoint.suppressed.to(model.device)
        nats = ar = 0.0
        task = turn_task(batch, spec)
        if self.checkpoint.spec is not None and not spec.noise.free:
            t = batch["t"].flatten()[batch["scored_at"]]
            nll = task_nll(model, spec, task, suppressed).double()
            nats = float((nll * time_weights(t.cpu(), "1/t")).sum())
        if first and self._reads_left_to_right:
            target = batch["target"]
            task = reading(task, columns_before(target), batch["ar_at"], target)
            task = replace(task, previous=None)  # the AR mode has no diffusion head
            ar = float(task_nll(model, spec, task, suppressed).double().sum())
        return nats, ar

    def _free_totals(self) -> list[float]:
        """Nats of all answers in each draw of the bound of a noise in the free form."""
        rows, starts = [], []
        for part in self.parts[0]:
            for turn in part.turns:
                fill = [part.ids[turn.end - 1]] * (turn.stop - turn.end)
                rows.append([*part.ids[: turn.end], *fill])
                starts.append(turn.start)
        found = bound(
            self.checkpoint.model, self.checkpoint.spec, rows, self.checkpoint.suppressed,
            self.samples, self.collate.recipe.train.seed, ROWS, starts,
        )  # fmt: skip
        return sum(draws.sum(1) for draws in found.draws).tolist()


def _unfilled(part: ConversationPart, recipe: Recipe) -> ConversationPart:
    """With `full` attention, an answer without the end tokens that training appends at random."""
    if recipe.convert.block_length is not None:
        return part
    (turn,) = part.turns
    return replace(part, ids=part.ids[: turn.end], turns=(replace(turn, stop=turn.end),))
