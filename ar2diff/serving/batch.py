"""Rows that the engine writes together, and what it tells of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, reduce

from torch import Tensor

from ..checkpoint.model import Checkpoint
from ..core.canvas import Canvas
from ..core.denoise import decoder_of, generators_of
from ..generation.complete import result_of
from .events import Committed, Done, Draft, Event
from .jobs import Job

Deliver = Callable[[Event], None]


@dataclass(eq=False)
class Ticket:
    """A job in the engine.

    Attributes:
        deliver: called with its events.
        cancelled: nobody waits for it any more. cut: its answer is to end where it is.
        sent: tokens that were told, from `begin` on.
        asked, started: when it was submitted, and when its first forward began.
    """

    job: Job
    deliver: Deliver
    cancelled: bool = False
    cut: bool = False
    sent: int = 0
    asked: float = field(default_factory=time.monotonic)
    started: float = 0.0

    @cached_property
    def begin(self) -> int:
        """First position that is written: the first gap, or the end of the prompt."""
        ids, mask = self.job.ids, self.job.spec.mask_token_id
        return ids.index(mask) if self.job.segments else len(ids)


class Batch:
    """Rows with the same options, in one decoder.

    Args:
        tickets: of the first rows.

    Attributes:
        rows: of the decoder's canvas, the tickets; None where a row has been dropped.
    """

    def __init__(self, checkpoint: Checkpoint, tickets: Sequence[Ticket]):
        jobs, now = [ticket.job for ticket in tickets], time.monotonic()
        self.checkpoint, self.shared = checkpoint, jobs[0].shared
        self.options = self.shared[0]
        self.rows: list[Ticket | None] = [*tickets]
        for ticket in tickets:
            ticket.started = now
        self.decoder = decoder_of(
            checkpoint.model, jobs[0].spec, reduce(Canvas.joined, (job.canvas for job in jobs)),
            self.options, finished=self._finished, draft=checkpoint.draft,
            generators=[
                generator
                for job in jobs
                for generator in generators_of(job.spec, job.canvas, job.options, job.number)
            ],
        )  # fmt: skip

    def __len__(self) -> int:
        return sum(ticket is not None for ticket in self.rows)

    def takes(self, other: Batch) -> bool:
        """Whether the rows of another batch can be written with these."""
        return (
            self.shared == other.shared
            and self.decoder.joins
            and other.decoder.joins
            and joins(self.decoder.canvas, other.decoder.canvas)
        )

    def join(self, other: Batch) -> None:
        """Take the rows of another batch, which has made a forward, as this one has."""
        for batch in (self, other):
            batch.compact()
        self.decoder.join(other.decoder)
        self.rows += other.rows
        other.decoder.close()

    def compact(self) -> None:
        """Drop rows that are over from the decoder."""
        left = [row for row, ticket in enumerate(self.rows) if ticket is not None]
        if len(left) < len(self.rows):
            self.decoder.select(left)
            self.rows = [self.rows[row] for row in left]

    def step(self) -> list[tuple[Ticket, int]]:
        """Forward all rows once, and tell what is new. Returns the tickets of rows that are done
        now, and their places in the decoder."""
        self.decoder.step()
        over = self.decoder.canvas.over
        for row, ticket in enumerate(self.rows):
            if ticket is not None:
                self._tell(row, ticket)
        return [(t, row) for row, t in enumerate(self.rows) if t is not None and over[row]]

    def drop(self, rows: Sequence[int]) -> None:
        """Write some rows no further."""
        for row in rows:
            self.decoder.canvas.close(row)
            self.rows[row] = None

    def cut(self, row: int) -> None:
        """End a row where it is, and tell what it has."""
        ticket = self.rows[row]
        self.decoder.canvas.close(row)
        self._tell(row, ticket)
        self.rows[row] = None

    def _finished(self, row: int, ids: Tensor) -> bool:
        ticket, constraint = self.rows[row], self.decoder.canvas.constraint
        if ticket is None or ticket.job.stops is None:
            return False
        whole = constraint is None or constraint.whole(row, len(ids))
        return whole and ticket.job.stops(row, ids)

    def _tell(self, row: int, ticket: Ticket) -> None:
        """Deliver what is new in a row."""
        canvas, job, begin = self.decoder.canvas, ticket.job, ticket.begin
        if not (job.streams or canvas.over[row]):
            return
        certain = max(begin, canvas.certain(row, job.options.revised))
        new, forwards = slice(begin + ticket.sent, certain), int(canvas.forwards[row])
        if certain > new.start and job.streams:
            told = (x[row, new].tolist() for x in (canvas.ids, canvas.logprob, canvas.step))
            noted, places = canvas.likeliest[row], range(new.start, new.stop)
            others = [noted.pop(place, []) for place in places] if canvas.alternatives else []
            ticket.deliver(Committed(*told, forwards, others))
        if job.drafts:
            ticket.deliver(self._draft(row, ticket, new.start, certain))
        ticket.sent = certain - begin
        if canvas.over[row]:
            ticket.deliver(Done(self._reason(row, ticket), self._result(row, ticket)))

    def _draft(self, row: int, ticket: Ticket, start: int, certain: int) -> Draft:
        canvas, options = self.decoder.canvas, ticket.job.options
        end = int(canvas.total[row])
        if options.mode != "diffusion" or canvas.over[row]:
            end = certain
        elif options.block_length:
            end = min(end, int(canvas.start[row]) + options.block_length)
        here = slice(start, max(end, certain))
        ids, logprobs, steps = (
            x[row, here].tolist() for x in (canvas.ids, canvas.logprob, canvas.step)
        )
        # A forward writes the drafts that it accepts, and one token after them.
        after = [*steps[1:], 0] if options.mode == "speculative" else [-1] * len(steps)
        return Draft(
            start=start - ticket.begin,
            ids=ids,
            logprobs=logprobs,
            steps=steps,
            drafted=[step == then for step, then in zip(steps, after, strict=True)],
            refused=canvas.refused[row],
            forwards=int(canvas.forwards[row]),
            seconds=time.monotonic() - ticket.started,
        )

    def _reason(self, row: int, ticket: Ticket) -> str:
        if ticket.cut:
            return "time"
        canvas, end = self.decoder.canvas, int(self.decoder.canvas.end[row])
        ids = canvas.ids[row, :end]
        stops = int(ids[-1]) in canvas.ends or self._finished(row, ids)
        gaps = not bool(canvas.given[row, : int(canvas.prompt[row])].all())
        return "stop" if stops or gaps or end < int(canvas.total[row]) else "length"

    def _result(self, row: int, ticket: Ticket) -> object:
        job, seconds = ticket.job, time.monotonic() - ticket.started
        return result_of(
            self.checkpoint, job.spec, job.options, self.decoder.canvas, row, seconds, job.segments
        )


def joins(first: Canvas, second: Canvas) -> bool:
    """Whether rows of two canvases can be on one: they have to match the same, or nothing."""
    own, new = first.constraint, second.constraint
    return own.joins(new) if own is not None else new is None
