"""The answers to a request: rows that the engine writes, and their text as it comes in."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ..core.errors import Ar2DiffError
from ..generation.results import Completion
from .engine import EngineBusy, EngineGone
from .events import Committed, Done, Event, Failed, Mailbox
from .jobs import Job
from .log import Account
from .protocol import field_of
from .refusal import Refusal, busy, gone, refused
from .service import Service
from .text import Filling, Text, Token, name_of

LEAST = -9999.0  # JSON has no infinity


@dataclass(frozen=True)
class Told(Token):
    """A token with its log-probability.

    Attributes:
        likeliest: names and log-probabilities of the likeliest tokens in its place.
    """

    logprob: float
    likeliest: list[tuple[str, float]]


@dataclass(eq=False)
class Row:
    """An answer.

    Attributes:
        index: of the choice. before: ids of its prompt.
        text: as far as it has come in.
        begin: first position that is written.
        ids, logprobs, likeliest: of its tokens, from there on.
        told, offset: tokens and characters of which log-probabilities were sent.
        result: once it is finished.
        reason: why it has ended: `stop`, `length` or `time`; None: it has not.
    """

    index: int
    job: Job
    before: list[int]
    text: Text | Filling
    begin: int
    box: Mailbox
    ticket: Any = None
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    likeliest: list[list[tuple[int, float]]] = field(default_factory=list)
    forwards: int = 0
    told: int = 0
    offset: int = 0
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
            self.forwards = event.result.forwards
            return self.text.end(event.result, event.reason == "stop")
        if isinstance(event, Committed):
            self.ids += event.ids
            self.logprobs += event.logprobs
            self.likeliest += event.likeliest or [[] for _ in event.ids]
            self.forwards = event.forwards
            return self.text.add(event.ids)
        return ""

    def fresh(self) -> list[Told]:
        """The tokens that were shown since the last call."""
        shown = self.text.ready(self.told, self.reason is not None)
        place = slice(self.told, self.told + len(shown))
        self.told += len(shown)
        tokenizer = self.text.tokenizer
        return [
            Told(token.text, token.name, finite(logprob),
                 [(name_of(tokenizer, other), finite(value)) for other, value in likeliest])
            for token, logprob, likeliest in zip(
                shown, self.logprobs[place], self.likeliest[place], strict=False
            )
        ]  # fmt: skip

    @property
    def finish_reason(self) -> str:
        """Why it has ended, in OpenAI's words."""
        return "stop" if self.reason == "stop" else "length"

    @property
    def tokens(self) -> int:
        """How many tokens were written."""
        return self.result.new_tokens if self.result else len(self.ids)

    def described(self) -> dict[str, Any]:
        """What this server tells of an answer besides."""
        found = self.result
        return {
            "mode": self.job.options.mode,
            "forwards": self.forwards,
            "tokens_per_forward": round(self.tokens / self.forwards, 3) if self.forwards else 0.0,
            "seconds": round(found.seconds, 4) if found else None,
            "matches": found.matches if found else None,
        }


class Answers:
    """The rows of a request.

    Args:
        jobs: in the order of the choices.
        account: gets what they cost.
        whole: the text of rows with gaps is the whole prompt, not its first gap.
    """

    def __init__(
        self, service: Service, jobs: Sequence[Job], account: Account, whole: bool = False
    ):
        self.service, self.account = service, account
        self.ring = asyncio.Event()
        self.rows = [self._row(index, job, whole) for index, job in enumerate(jobs)]

    def _row(self, index: int, job: Job, whole: bool) -> Row:
        tokenizer, before = self.service.checkpoint.tokenizer, job.prompt
        mask = job.spec.mask_token_id
        gaps = [place for place, token in enumerate(before) if token == mask and job.segments]
        text: Text | Filling
        if gaps:
            text = Filling(tokenizer, before, job.segments, gaps, whole)
        else:
            text = Text(tokenizer, before, job.options.stop_strings)
        begin = gaps[0] if gaps else len(before)
        return Row(index, job, before, text, begin, Mailbox(self.ring.set))

    def submit(self) -> None:
        """Have the rows written.

        Raises:
            Refusal: too many wait, or the engine has stopped.
        """
        post, rows = self.service.post, [row for row in self.rows if not row.reason]
        try:
            tickets = self.service.engine.submit(
                [row.job for row in rows], [partial(post.put, row.box) for row in rows]
            )
        except EngineBusy:
            raise busy() from None
        except EngineGone:
            raise gone() from None
        for row, ticket in zip(rows, tickets, strict=True):
            row.ticket = ticket

    def cancel(self) -> None:
        """Drop the rows that are not finished: nobody waits for them."""
        for row in self.rows:
            if row.ticket is not None and row.reason is None:
                self.service.engine.cancel(row.ticket)
        self.account.tokens = sum(row.tokens for row in self.rows)
        self.account.forwards = sum(row.forwards for row in self.rows)

    async def news(self) -> AsyncIterator[tuple[Row, Event, str]]:
        """What the engine tells of each row, with the text that may be shown since. When the time
        of the request is over, rows end where they are.

        Raises:
            Refusal: a row cannot be finished; or the time is over, and nothing was written.
        """
        limits, loop = self.service.limits, asyncio.get_running_loop()
        deadline = loop.time() + limits.seconds - self.account.seconds
        cut = False
        while left := [row for row in self.rows if row.reason is None]:
            try:
                async with asyncio.timeout_at(deadline):
                    await self.ring.wait()
            except TimeoutError:
                if cut:  # a forward takes that long
                    raise out_of_time(limits.seconds) from None
                cut, deadline = True, deadline + limits.leave
                for row in left:
                    self.service.engine.cut(row.ticket)
                continue
            self.ring.clear()
            for row in left:
                for event in row.box.take():
                    if isinstance(event, Failed) and isinstance(event.error, TimeoutError):
                        raise out_of_time(limits.seconds)  # another row may have some text
                    yield row, event, row.take(event)


def finite(logprob: float) -> float:
    """A log-probability that JSON can hold."""
    return max(logprob, LEAST) if logprob == logprob else LEAST


def out_of_time(limit: float) -> Refusal:
    """A 503: nothing was written in the time that a request may take."""
    told = f"nothing was written within the {limit:g} seconds that a request may take"
    return Refusal(503, f"{told}; try again later", None, "timeout", {"retry-after": "10"})


def _failed(error: BaseException) -> Refusal:
    if isinstance(error, Ar2DiffError):
        return refused(error, field_of)
    if isinstance(error, EngineGone):
        return gone()
    raise error
