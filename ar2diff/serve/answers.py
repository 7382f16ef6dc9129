"""The answers to a request: their rows are prepared, written by the engine, and read here."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ..core.canvas import Canvas
from ..core.errors import Ar2DiffError
from ..generation.results import Completion
from ..generation.tokens import draw_tokens
from .engine import EngineBusy, EngineGone, Ticket, begin_of
from .events import Committed, Done, Draft, Event, Failed, Mailbox
from .jobs import Job
from .protocol import field_of
from .refusal import Refusal, busy, gone, refused
from .service import Service
from .text import Filling, Text


@dataclass(eq=False)
class Row:
    """An answer.

    Attributes:
        index: of the choice.
        text: as far as it has come in.
        ids, logprobs: of its tokens.
        result: once it is finished, and why it is: `stop`, `length` or `time`.
    """

    index: int
    job: Job
    text: Text | Filling
    begin: int
    box: Mailbox
    ticket: Ticket | None = None
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    forwards: int = 0
    result: Completion | None = None
    reason: str | None = None

    def take(self, event: Event) -> str:
        """Take in what the engine tells; returns the text that may be shown since then.

        Raises:
            Refusal: the row cannot be finished.
        """
        if isinstance(event, Failed):
            raise _failed(event.error)
        if isinstance(event, Done):
            self.result, self.reason = event.result, event.reason
            return self.text.end(self.whole(event.result), event.reason == "stop")
        if isinstance(event, Committed):
            self.ids += event.ids
            self.logprobs += event.logprobs
            self.forwards = event.forwards
            return self.text.add(event.ids)
        return ""

    def whole(self, result: Completion) -> str:
        """The text of a result that the client has asked for."""
        if isinstance(self.text, Filling) and not self.text.whole:
            return (result.filled or ("",))[0]
        return result.text

    def cut(self) -> str:
        """End the row where it is, because its time is over; returns the rest of its text."""
        self.reason = "time"
        return self.text.end(self.text.text, False)

    @property
    def finish_reason(self) -> str:
        """Why it ended, in OpenAI's words."""
        if isinstance(self.text, Filling) and self.reason != "time":
            return "stop"  # a gap that is filled is not cut off
        return "stop" if self.reason == "stop" else "length"

    @property
    def tokens(self) -> int:
        """How many tokens were written."""
        return self.result.new_tokens if self.result else len(self.ids)

    def described(self) -> dict[str, Any]:
        """What only this server tells of an answer."""
        found = self.result
        forwards = found.forwards if found else self.forwards
        return {
            "mode": self.job.options.mode,
            "forwards": forwards,
            "tokens_per_forward": round(self.tokens / forwards, 3) if forwards else 0.0,
            "seconds": round(found.seconds, 4) if found else None,
            "matches": found.matches if found else None,
        }

    def draft(self, draft: Draft, tokenizer: Any) -> dict[str, Any]:
        """A draft as clients get it."""
        mask, options = self.job.spec.mask_token_id, self.job.options
        size = options.block_length if options.mode == "diffusion" else None
        texts = draw_tokens(tokenizer, draft.ids, mask)
        tokens = []
        for n, text in enumerate(texts):
            place, step = draft.start + n, draft.steps[n]
            if draft.ids[n] == mask:
                state = "open"
            elif draft.drafted[n]:
                state = "drafted"
            else:
                state = "decided" if step else "given"
            tokens.append(
                {
                    "text": text,
                    "step": step,
                    "p": round(math.exp(min(draft.logprobs[n], 0.0)), 4) if step else 0.0,
                    "state": state,
                    "opens": bool(size and place and (self.begin + place) % size == 0),
                }
            )
        return {
            "index": self.index,
            "start": draft.start,
            "forward": draft.forwards,
            "seconds": round(draft.seconds, 4),
            "tokens": tokens,
            "refused": draw_tokens(tokenizer, draft.refused, mask),
        }


class Answers:
    """The rows of a request.

    Args:
        jobs: in the order of the choices.
        whole: the text of rows with gaps is the whole prompt.
    """

    def __init__(self, service: Service, jobs: Sequence[Job], whole: bool = False):
        self.service = service
        self.ring = asyncio.Event()
        self.rows = [self._row(index, job, whole) for index, job in enumerate(jobs)]

    def _row(self, index: int, job: Job, whole: bool) -> Row:
        tokenizer, canvas = self.service.checkpoint.tokenizer, job.canvas
        before = canvas.ids[0, : int(canvas.prompt[0])].tolist()
        text: Text | Filling
        if gaps := _gaps(canvas):
            text = Filling(tokenizer, before, job.segments, gaps, whole)
        else:
            text = Text(tokenizer, before, job.options.stop_strings)
        return Row(index, job, text, begin_of(job), Mailbox(self.ring.set))

    def submit(self) -> None:
        """Have the rows written.

        Raises:
            Refusal: too many wait, or the engine has stopped.
        """
        loop = asyncio.get_running_loop()
        try:
            tickets = self.service.engine.submit(
                [row.job for row in self.rows],
                [partial(_deliver, loop, row.box) for row in self.rows],
            )
        except EngineBusy:
            raise busy() from None
        except EngineGone:
            raise gone() from None
        for row, ticket in zip(self.rows, tickets, strict=True):
            row.ticket = ticket

    def cancel(self) -> None:
        """Drop the rows that are not finished; nobody waits for them."""
        for row in self.rows:
            if row.ticket is not None and row.reason is None:
                self.service.engine.cancel(row.ticket)

    async def events(self) -> AsyncIterator[tuple[Row, Event | None]]:
        """What the engine tells of each row, in turn. None: the time of the request is over, and
        the row ends where it is."""
        deadline = asyncio.get_running_loop().time() + self.service.limits.seconds
        while left := [row for row in self.rows if row.reason is None]:
            try:
                async with asyncio.timeout_at(deadline):
                    await self.ring.wait()
            except TimeoutError:
                for row in left:
                    self.service.engine.cancel(row.ticket)
                    yield row, None
                return
            self.ring.clear()
            for row in left:
                for event in row.box.take():
                    yield row, event

    async def finished(self) -> None:
        """Wait for all rows.

        Raises:
            Refusal: one of them cannot be finished, or the time was over before anything was
                written.
        """
        async for row, event in self.events():
            if event is None:
                row.cut()
            else:
                row.take(event)


def _gaps(canvas: Canvas) -> list[int]:
    """The places of a prompt's masks."""
    return (~canvas.given[0, : int(canvas.prompt[0])]).nonzero()[:, 0].tolist()


def _deliver(loop: asyncio.AbstractEventLoop, box: Mailbox, event: Event) -> None:
    """Put an event into a mailbox, from the engine's thread."""
    try:
        loop.call_soon_threadsafe(box.put, event)
    except RuntimeError:  # the loop is closed: nobody reads any more
        pass


def _failed(error: BaseException) -> Refusal:
    if isinstance(error, Ar2DiffError):
        return refused(error, field_of)
    return gone()
