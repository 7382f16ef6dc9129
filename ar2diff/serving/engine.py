"""The engine: one thread owns the model, and rows join and leave between its forwards.

A turn of the thread takes new rows, reads each one's prompt in a forward of its own, joins it to
the rows with the same options, and forwards all of them once. So a row's first text never waits for
another row's last, and what a row writes is what it would write alone: the decoders keep rows apart
(see core), up to near-ties that rounding, which differs with the shape of a batch, may turn.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from threading import Condition, Thread
from typing import Any

from ..checkpoint.model import Checkpoint
from ..generation.tokens import encode
from .batch import Batch, Deliver, Ticket, joins
from .events import Failed
from .jobs import Job, job_of
from .log import log_bug
from .prefix import Context, PrefixCache

WIDER, ROOM = 2, 32  # prompts are read together up to this many times as long, and tokens more
WARMED = 10.0  # seconds after which no more numbers of rows are tried before the first request


class EngineBusy(Exception):
    """As many rows wait as may wait."""


class EngineGone(Exception):
    """The engine has died, or is closed."""


@dataclass
class Stats:
    """What the engine has done, and does now.

    Attributes:
        forwards: of batches and of prompts. tokens: that were decided. rows: that were finished.
        reused: tokens of prompts that were read before. prompts: tokens of prompts that were read.
        running, waiting: rows now.
    """

    forwards: int = 0
    tokens: int = 0
    rows: int = 0
    reused: int = 0
    prompts: int = 0
    running: int = 0
    waiting: int = 0


class Engine:
    """Writes rows.

    Args:
        max_batch: rows that are written at once. max_waiting: rows that may wait for a place.
        prefix_bytes: of keys and values of beginnings that are kept; 0: none are.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        max_batch: int = 32,
        max_waiting: int = 256,
        prefix_bytes: int = 256 << 20,
    ):
        self.checkpoint, self.max_batch, self.max_waiting = checkpoint, max_batch, max_waiting
        self.stats = Stats()
        spec = checkpoint.read_as
        grain = 1 if spec.attention == "causal_context" else spec.block_length or 1
        self.prefixes = PrefixCache(prefix_bytes, grain)
        self.batches: list[Batch] = []
        self._waiting: deque[Ticket] = deque()
        self._new: list[Ticket] = []  # which wait no more, and are in no batch yet
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._changed = Condition()
        self._closing = False
        self.dead: BaseException | None = None
        self._thread = Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether rows are written."""
        return self.dead is None and self._thread.is_alive()

    def submit(self, jobs: Sequence[Job], deliver: Sequence[Deliver]) -> list[Ticket]:
        """Have rows written, all or none; called by any thread.

        Args:
            deliver: called by the engine's thread with each row's events; must not wait.

        Raises:
            EngineBusy, EngineGone.
        """
        with self._changed:
            self._check(len(self._waiting) + len(jobs))
            tickets = [Ticket(job, to) for job, to in zip(jobs, deliver, strict=True)]
            self._waiting += tickets
            self.stats.waiting = len(self._waiting)
            self._changed.notify()
        return tickets

    def call(self, function: Callable[[], Any]) -> Future[Any]:
        """Have a function called between two forwards by the thread that owns the model.

        Raises:
            EngineBusy, EngineGone.
        """
        future: Future[Any] = Future()
        with self._changed:
            self._check(len(self._calls) + 1)
            self._calls.append((function, future))
            self._changed.notify()
        return future

    def cancel(self, ticket: Ticket) -> None:
        """Have a row dropped before the next forward; called by any thread. Its events end."""
        ticket.cancelled = True

    def cut(self, ticket: Ticket) -> None:
        """Have a row end where it is before the next forward; called by any thread. If its first
        forward was not made yet, it fails by a `TimeoutError`."""
        ticket.cut = True

    def close(self, drain: bool = True) -> None:
        """Take no more rows, and wait until the thread has ended: with `drain`, when all that were
        taken are finished."""
        with self._changed:
            self._closing = True
            if not drain:
                for ticket in self._tickets():
                    ticket.cancelled = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    def warm(self, settings: dict[str, Any]) -> None:
        """Make the first forwards before the first request: those that are timed to find out how
        many drafts pay for so many rows take a moment. Called before `start`."""
        checkpoint, began, rows = self.checkpoint, time.monotonic(), 1
        ids = encode(checkpoint.tokenizer, checkpoint.read_as, ["a"])
        while rows <= self.max_batch and time.monotonic() - began < WARMED:
            jobs = [job_of(checkpoint, ids, {**settings, "max_new_tokens": 8}) for _ in range(rows)]
            batches = [Batch(checkpoint, [Ticket(job, lambda _: None)]) for job in jobs]
            for batch in batches:
                batch.step()
            for batch in batches[1:]:
                if batches[0].takes(batch) and len(batches[0]) and len(batch):
                    batches[0].join(batch)
            batches[0].step()
            rows *= 2

    def _check(self, waiting: int) -> None:
        if self._closing:
            raise EngineGone
        if waiting > self.max_waiting:
            raise EngineBusy

    def _tickets(self) -> Iterator[Ticket]:
        yield from self._waiting
        yield from self._new
        for batch in self.batches:
            yield from (ticket for ticket in batch.rows if ticket is not None)

    # The thread

    def _run(self) -> None:
        try:
            while self.turn():
                pass
        except BaseException as error:
            self.dead = error
            log_bug(error)
        with self._changed:
            self._closing = True
            left, calls = {*self._tickets()}, [*self._calls]
        for ticket in left:
            ticket.deliver(Failed(EngineGone()))
        for _, future in calls:
            if future.set_running_or_notify_cancel():
                future.set_exception(EngineGone())

    def turn(self) -> bool:
        """Make a forward of each batch; what the thread does over and over. Returns False when the
        engine is closed and there is nothing left to do."""
        with self._changed:
            while not (self._waiting or self.batches or self._calls):
                if self._closing:
                    return False
                self._changed.wait()
        for _ in range(len(self._calls)):
            _answer(*self._calls.popleft())
        self._drop()
        standing = [*self.batches]
        self._new = self._admitted()
        for group in alike(self._new):
            self._begin(group)
            self._new = [ticket for ticket in self._new if ticket not in group]
        for batch in standing:
            self._step(batch)
        self._forget()
        self.stats.running = sum(map(len, self.batches))
        return True

    def _admitted(self) -> list[Ticket]:
        """Rows that have waited and for which there is room now. One that begins like another one
        waits for a forward more, after which that beginning is known."""
        room = self.max_batch - sum(map(len, self.batches))
        new: list[Ticket] = []
        later: list[Ticket] = []
        read: set[int] = set()
        with self._changed:
            while self._waiting and len(new) < room:
                ticket = self._waiting.popleft()
                if ticket.cancelled:
                    continue
                key = self.prefixes.unknown(*self._beginning(ticket))
                (later if key in read else new).append(ticket)
                read |= {key} - {None}
            self._waiting.extendleft(reversed(later))
            self.stats.waiting = len(self._waiting)
        return new

    def _begin(self, tickets: list[Ticket]) -> None:
        """Read the prompts of rows, in their first forward, and join them to others."""
        try:
            batch = Batch(self.checkpoint, tickets)
            host = self._host(batch)
            if host is not None:
                batch.decoder.expect(host.decoder)
            self._resume(batch)
        except Exception as error:
            for ticket in tickets:
                ticket.deliver(Failed(error))
            return
        self.batches.append(batch)
        self._step(batch)
        for row, ticket in enumerate(batch.rows):
            if ticket is not None:
                self._keep(batch, row, ticket)
        if not len(batch):
            return
        host = self._host(batch)
        if host is not None:
            host.join(batch)
            self.batches.remove(batch)

    def _host(self, batch: Batch) -> Batch | None:
        """The batch that takes the rows of a new one."""
        others = (other for other in self.batches if other is not batch and len(other))
        return next((other for other in others if other.takes(batch)), None)

    def _step(self, batch: Batch) -> None:
        """Make a forward of a batch. One that fails takes its rows with it, and no others."""
        try:
            over = batch.step()
        except Exception as error:
            for ticket in filter(None, batch.rows):
                ticket.deliver(Failed(error))
            batch.drop([row for row, ticket in enumerate(batch.rows) if ticket is not None])
            return
        self.stats.forwards += 1
        for ticket, row in over:
            self.stats.rows += 1
            self.stats.tokens += ticket.sent
            self._keep(batch, row, ticket)
        batch.drop([row for _, row in over])

    def _drop(self) -> None:
        """End rows that are cut, and drop those that nobody waits for."""
        with self._changed:
            late = [ticket for ticket in self._waiting if ticket.cut and not ticket.cancelled]
            for ticket in late:
                self._waiting.remove(ticket)
        for ticket in late:
            ticket.deliver(Failed(TimeoutError()))
        for batch in self.batches:
            held = [(row, ticket) for row, ticket in enumerate(batch.rows) if ticket is not None]
            batch.drop([row for row, ticket in held if ticket.cancelled])
            for row, ticket in held:
                if ticket.cut and not ticket.cancelled:
                    batch.cut(row)
        self._forget()

    def _forget(self) -> None:
        """Let go of batches all of whose rows are over."""
        for batch in self.batches:
            if not len(batch):
                batch.decoder.close()
        self.batches = [batch for batch in self.batches if len(batch)]

    # Beginnings

    def _reuses(self, batch: Batch) -> bool:
        """Whether the keys and values of a batch's contexts are those of any text that begins so:
        blocks of another length than the model's are read otherwise."""
        grain, options = self.prefixes.grain, batch.options
        even = grain == 1 or options.mode != "diffusion" or options.block_length == grain
        return bool(self.prefixes.budget) and batch.decoder.resumes and even

    def _beginning(self, ticket: Ticket) -> tuple[list[int], int]:
        """The names of the tokens before what a row writes first, and how many of them may be
        known: not all, since the last one says what follows."""
        canvas, end = ticket.job.canvas, ticket.begin
        if ticket.job.options.mode == "diffusion":
            size = ticket.job.options.block_length or end + 1
            end = end // size * size
        return ticket.job.known_as(canvas.ids[0, :end].tolist()), max(0, end - 1)

    def _resume(self, batch: Batch) -> None:
        """Give a decoder what is known of its rows' prompts."""
        tickets = [ticket for ticket in batch.rows if ticket is not None]
        self.stats.prompts += sum(ticket.begin for ticket in tickets)
        if not self._reuses(batch):
            return
        contexts = [self._known(ticket) for ticket in tickets]
        if any(contexts):
            self.stats.reused += sum(c[0][0].shape[2] for c in contexts if c)
            batch.decoder.resume(contexts)

    def _known(self, ticket: Ticket) -> Context:
        """The keys and values of the first tokens of a row that are known, of no part of what is
        read in both directions."""
        context = self.prefixes.get(*self._beginning(ticket))
        count = context[0][0].shape[2] if context else 0
        whole = ticket.job.uncut(count)
        whole -= whole % self.prefixes.grain
        if whole == count:
            return context
        return [(k[:, :, :whole], v[:, :, :whole]) for k, v in context] if whole else []

    def _keep(self, batch: Batch, row: int, ticket: Ticket) -> None:
        """Keep what has been read of a row."""
        context = batch.decoder.context(row) if self._reuses(batch) else []
        if context:
            count = context[0][0].shape[2]
            ids = batch.decoder.canvas.ids[row, :count].tolist()
            self.prefixes.put(ticket.job.known_as(ids), context)


def _answer(function: Callable[[], Any], future: Future[Any]) -> None:
    if not future.set_running_or_notify_cancel():  # nobody waits any more
        return
    try:
        found = function()
    except Exception as error:
        future.set_exception(error)
    except BaseException:  # the thread is told to end
        future.set_exception(EngineGone())
        raise
    else:
        future.set_result(found)


def alike(tickets: Sequence[Ticket]) -> list[list[Ticket]]:
    """Tickets by what their rows have in common, and by the length of their prompts: a forward
    takes as long as if all prompts had that of the longest."""
    groups: list[list[Ticket]] = []
    for ticket in sorted(tickets, key=lambda ticket: ticket.begin):
        job = ticket.job
        for group in groups:
            first = group[0].job
            if (
                job.shared == first.shared
                and joins(first.canvas, job.canvas)
                and ticket.begin <= WIDER * group[0].begin + ROOM
            ):
                group.append(ticket)
                break
        else:
            groups.append([ticket])
    return groups
