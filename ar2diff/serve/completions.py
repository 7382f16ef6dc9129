"""/v1/completions."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from ..core.errors import Ar2DiffError
from ..core.generate import room_of
from ..generation.complete import settings_of
from ..generation.prompts import Segments
from ..generation.tokens import encode
from .answers import Answers, Row
from .events import Draft
from .jobs import Job, job_of
from .protocol import CompletionRequest, field_of
from .refusal import Refusal, refused
from .service import Service


async def completed(service: Service, request: CompletionRequest) -> Completions:
    """The answers to a request, which are being written.

    Raises:
        Refusal: the request cannot be answered.
    """
    settings = request.settings()
    jobs = await service.lane(settings).run(_jobs, service, request, settings)
    answers = Answers(service, jobs, whole=request.revise is not None)
    answers.submit()
    return Completions(service, request, answers)


def _jobs(service: Service, request: CompletionRequest, settings: dict[str, Any]) -> list[Job]:
    try:
        return [
            job_of(service.checkpoint, ids, own, segments=segments, number=number,
                   drafts=bool(request.drafts and request.stream))
            for ids, own, segments in _rows(service, request, settings)
            for number in range(request.n or 1)
        ]  # fmt: skip
    except Ar2DiffError as error:
        raise refused(error, field_of) from None


def _rows(
    service: Service, request: CompletionRequest, settings: dict[str, Any]
) -> list[tuple[list[int], dict[str, Any], Segments | None]]:
    """Ids, settings and segments of each prompt."""
    checkpoint, rows = service.checkpoint, []
    base = {**service.base(), **settings}
    for prompt in request.prompt:
        segments: Segments = [prompt] if isinstance(prompt, str) else []
        if request.suffix is not None:
            segments = [prompt, request.max_tokens or 16, request.suffix]
        elif request.revise is not None:
            raise Refusal(400, "revise is not there yet", "revise")
        gaps = len(segments) > 1
        if gaps:
            own = {**base, "max_new_tokens": 0}
            spec, options = settings_of(checkpoint, own, True)
        else:
            spec, options = settings_of(checkpoint, base)
        if isinstance(prompt, str):
            with service.encoding:
                ids = encode(checkpoint.tokenizer, spec, segments)
        else:
            ids = prompt
        if not gaps:
            room = room_of(checkpoint.model, spec, options)
            new = request.max_tokens
            if new is None:
                new = (
                    options.max_new_tokens
                    if room is None
                    else max(1, min(options.max_new_tokens, room - len(ids)))
                )
            own = {**base, "max_new_tokens": new}
        rows.append((ids, own, segments if gaps else None))
    return rows


class Completions:
    """The answers to a request, as JSON or as a stream."""

    def __init__(self, service: Service, request: CompletionRequest, answers: Answers):
        self.service, self.request, self.answers = service, request, answers
        self.head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": service.name,
        }

    async def whole(self) -> dict[str, Any]:
        """The answer, once all of it is there."""
        await self.answers.finished()
        choices = [
            self._choice(row, row.text.shown, row.finish_reason) for row in self.answers.rows
        ]
        for row, choice in zip(self.answers.rows, choices, strict=True):
            choice["ar2diff"] = row.described()
        return {**self.head, "choices": choices, "usage": self._usage()}

    async def chunks(self) -> AsyncIterator[dict[str, Any]]:
        """The answer in parts."""
        async for row, event in self.answers.events():
            if isinstance(event, Draft):
                drawn = row.draft(event, self.service.checkpoint.tokenizer)
                yield {**self.head, "choices": [self._choice(row, "", None)], "draft": drawn}
                continue
            text = row.cut() if event is None else row.take(event)
            if row.reason is not None:
                choice = self._choice(row, text, row.finish_reason)
                yield {**self.head, "choices": [{**choice, "ar2diff": row.described()}]}
            elif text:
                yield {**self.head, "choices": [self._choice(row, text, None)]}
        if self.request.usage:
            yield {**self.head, "choices": [], "usage": self._usage()}

    def _choice(self, row: Row, text: str, reason: str | None) -> dict[str, Any]:
        return {"index": row.index, "text": text, "logprobs": None, "finish_reason": reason}

    def _usage(self) -> dict[str, int]:
        rows = self.answers.rows
        prompt = sum(
            len(row.job.canvas.given[0, : int(row.job.canvas.prompt[0])])
            for row in rows[:: self.request.n or 1]
        )
        new = sum(row.tokens for row in rows)
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}
