"""What both kinds of answers have in common on the wire: whole, or in parts."""

from __future__ import annotations

import math
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from typing import Any

from ..generation.tokens import draw_tokens
from .answers import Answers, Row, finite
from .events import Draft
from .protocol import Request
from .service import Service


class Reply(ABC):
    """The answers to a request, as JSON or as a stream.

    Args:
        answers: that were submitted.
    """

    kind, part, prefix = "", "", ""  # kinds of object, whole and in parts, and of their ids

    def __init__(self, service: Service, request: Request, answers: Answers):
        self.service, self.request, self.answers = service, request, answers
        self.head = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "object": self.kind,
            "created": int(time.time()),
            "model": service.name,
        }

    async def whole(self) -> dict[str, Any]:
        """The answers, once all are there.

        Raises:
            Refusal: one of them cannot be finished.
        """
        async for _ in self.answers.news():
            pass
        choices = [{**self.choice(row), "ar2diff": row.described()} for row in self.answers.rows]
        return {**self.head, "choices": choices, "usage": self.usage()}

    async def chunks(self) -> AsyncIterator[dict[str, Any]]:
        """The answers in parts.

        Raises:
            Refusal: one of them cannot be finished.
        """
        for row in self.answers.rows:
            for choice in self.opening(row):
                yield self._chunk(choice)
            if row.reason is not None:
                yield self._last(row)
        async for row, event, text in self.answers.news():
            if text:
                self.answers.account.wrote()
            if isinstance(event, Draft):
                drawn = drawn_draft(row, event, self.service.checkpoint.tokenizer)
                yield {**self._chunk(self.empty(row)), "draft": drawn}
                continue
            for choice in self.parts(row, text):
                yield self._chunk(choice)
            if row.reason is not None:
                yield self._last(row)
        if self.request.usage:
            yield {**self.head, "object": self.part, "choices": [], "usage": self.usage()}

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        return {**self.head, "object": self.part, "choices": [choice]}

    def _last(self, row: Row) -> dict[str, Any]:
        choice = {**self.empty(row), "finish_reason": self.finish_reason(row)}
        return self._chunk({**choice, "ar2diff": row.described()})

    @abstractmethod
    def choice(self, row: Row) -> dict[str, Any]:
        """A whole answer."""

    def opening(self, row: Row) -> list[dict[str, Any]]:
        """What a stream begins with."""
        return []

    @abstractmethod
    def parts(self, row: Row, text: str) -> list[dict[str, Any]]:
        """What there is to send of a row whose text has grown."""

    @abstractmethod
    def empty(self, row: Row) -> dict[str, Any]:
        """A part without anything in it."""

    def finish_reason(self, row: Row) -> str:
        """Why a row has ended."""
        return row.finish_reason

    def usage(self) -> dict[str, int]:
        """Numbers of tokens; a prompt counts once, however many answers it has."""
        rows = self.answers.rows
        prompt = sum(len(row.before) for row in rows[:: self.request.n or 1])
        new = sum(row.tokens for row in rows)
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


def drawn_draft(row: Row, draft: Draft, tokenizer: Any) -> dict[str, Any]:
    """A draft as clients get it."""
    options, mask = row.job.options, row.job.spec.mask_token_id
    size = options.block_length if options.mode == "diffusion" else None
    tokens = []
    for n, text in enumerate(draw_tokens(tokenizer, draft.ids, mask)):
        place, step = draft.start + n, draft.steps[n]
        state = "decided" if step else "open" if draft.ids[n] == mask else "given"
        tokens.append(
            {
                "text": text,
                "step": step,
                "p": round(math.exp(min(finite(draft.logprobs[n]), 0.0)), 4) if step else 0.0,
                "state": "drafted" if draft.drafted[n] else state,
                "opens": bool(size and place and (row.begin + place) % size == 0),
            }
        )
    return {
        "index": row.index,
        "start": draft.start,
        "forward": draft.forwards,
        "seconds": round(draft.seconds, 4),
        "tokens": tokens,
        "refused": draw_tokens(tokenizer, draft.refused, mask),
    }
