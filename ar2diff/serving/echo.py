"""The log-probabilities of a prompt's tokens, which the AR mode reads in a forward."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from ..checkpoint.model import Checkpoint
from ..core.attention import Slots, model_mask
from ..core.forward import logits_at
from ..core.samplers import likeliest
from .answers import Answers, Row, finite
from .engine import EngineBusy, EngineGone
from .protocol import CompletionRequest
from .refusal import busy, gone
from .service import Service
from .text import Text, name_of

CHUNK = 1024  # tokens that are read between two forwards of others


@dataclass(frozen=True)
class Echo:
    """A prompt as it stands before its answers.

    Attributes:
        logprobs: in OpenAI's form; None: nobody asks.
    """

    text: str
    logprobs: dict[str, list[Any]] | None


async def read_prompts(
    service: Service, request: CompletionRequest, answers: Answers
) -> list[Echo]:
    """The prompts of a request.

    Raises:
        Refusal: too much waits, or the engine has stopped.
    """
    found = []
    rows = answers.rows[:: request.n or 1]
    for row, given in zip(rows, request.prompt, strict=True):
        reading = Reading(service.checkpoint, row.before, request.alternatives)
        try:
            while request.logprobs is not None and not reading.done:
                # Shielded: the engine answers a call whether somebody waits for it or not.
                await asyncio.shield(asyncio.wrap_future(service.engine.call(reading.read)))
        except EngineBusy:
            raise busy() from None
        except EngineGone:
            raise gone() from None
        found.append(_echo(service.checkpoint.tokenizer, row, given, request.logprobs, reading))
    return found


class Reading:
    """A text that is read from left to right.

    Attributes:
        logprobs: of its tokens from the second on. best: the likeliest ones in their places, and
            the log-probabilities of these; as many as `alternatives`.
    """

    def __init__(self, checkpoint: Checkpoint, ids: Sequence[int], alternatives: int):
        self.alternatives = alternatives
        self.checkpoint, self.ids = checkpoint, torch.tensor([ids])
        self.logprobs: list[float] = []
        self.best: list[list[tuple[int, float]]] = []
        self.at, self.cache = 0, DynamicCache()

    @property
    def done(self) -> bool:
        """Whether all of it was read; nothing follows the last token."""
        return self.at >= self.ids.shape[1] - 1

    @torch.no_grad()
    def read(self) -> None:
        """Read some more; called by the thread that owns the model."""
        begin, end = self.at, min(self.at + CHUNK, self.ids.shape[1] - 1)
        self.at = end
        logits = self._logits(begin, end)
        logits[:, self.checkpoint.suppressed.to(logits.device)] = -torch.inf
        logprobs = logits.log_softmax(-1)
        target = self.ids[0, begin + 1 : end + 1, None].to(logits.device)
        self.logprobs += logprobs.gather(1, target)[:, 0].tolist()
        for pair in zip(*(x.tolist() for x in likeliest(logits, self.alternatives)), strict=True):
            self.best.append([*zip(*pair, strict=True)])

    def _logits(self, begin: int, end: int) -> Tensor:
        model, spec = self.checkpoint.model, self.checkpoint.spec_or_causal
        pos = torch.arange(end, device=model.device)[None]
        slots = Slots(torch.zeros_like(pos), pos, torch.zeros_like(pos, dtype=torch.bool))
        read = range(begin, end)
        mask = model_mask(model, slots, "causal_context", 1, spec.local_window, queries=read)
        index = torch.arange(end - begin, device=model.device)
        return logits_at(
            model, index, cache=self.cache, input_ids=self.ids[:, begin:end].to(model.device),
            attention_mask=mask, position_ids=pos[:, begin:],
        ).float()  # fmt: skip


def _echo(
    tokenizer: Any, row: Row, given: str | list[int], asked: int | None, reading: Reading
) -> Echo:
    text = Text(tokenizer, [])
    text.add(row.before)
    text.cut()
    shown = given if isinstance(given, str) else text.shown
    if asked is None:
        return Echo(shown, None)
    tokens = text.ready(0, True)
    tops: list[dict[str, float] | None] = [None]
    for token, logprob, best in zip(tokens[1:], reading.logprobs, reading.best, strict=True):
        top = {name_of(tokenizer, other): finite(value) for other, value in best}
        tops.append({**top, token.name: finite(logprob)})
    offsets = [0, *accumulate(len(token.text) for token in tokens)][: len(tokens)]
    return Echo(
        shown,
        {
            "tokens": [token.name for token in tokens],
            "token_logprobs": [None, *map(finite, reading.logprobs)],
            "top_logprobs": tops,
            "text_offset": offsets,
        },
    )
