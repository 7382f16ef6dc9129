"""The engine: one thread owns the model, and rows join and leave between its forwards."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from threading import Condition, Thread
from typing import Any

from ..checkpoint.model import Checkpoint
from ..core.denoise import denoise
from ..generation.complete import result_of
from .events import Committed, Done, Draft, Event, Failed
from .jobs import Job

Deliver = Callable[[Event], None]


class EngineBusy(Exception):
    """As many rows wait as may wait."""


class EngineGone(Exception):
    """The engine has died, or is closed."""


@dataclass(eq=False)
class Ticket:
    """A job in the engine."""

    job: Job
    deliver: Deliver
    cancelled: bool = False
    sent: int = 0
    started: float = 0.0


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
        self.waiting: deque[Ticket] = deque()
        self.calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self.running: list[tuple[Ticket, Iterator[Any], Any]] = []
        self.changed = Condition()
        self.closing = False
        self.dead: BaseException | None = None
        self.forwards = 0
        self.thread = Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self.thread.start()

    @property
    def alive(self) -> bool:
        """Whether jobs are written."""
        return self.dead is None and self.thread.is_alive()

    def submit(self, jobs: list[Job], deliver: list[Deliver]) -> list[Ticket]:
        """Have rows written, all or none; called by any thread.

        Args:
            deliver: called by the engine's thread with each row's events; must not wait.

        Raises:
            EngineBusy, EngineGone.
        """
        with self.changed:
            if not self.alive or self.closing:
                raise EngineGone
            if len(self.waiting) + len(jobs) > self.max_waiting:
                raise EngineBusy
            tickets = [Ticket(job, to) for job, to in zip(jobs, deliver, strict=True)]
            self.waiting += tickets
            self.changed.notify()
        return tickets

    def call(self, function: Callable[[], Any]) -> Future[Any]:
        """Have a function called between two forwards by the thread that owns the model.

        Raises:
            EngineBusy, EngineGone.
        """
        with self.changed:
            if not self.alive or self.closing:
                raise EngineGone
            if len(self.calls) >= self.max_waiting:
                raise EngineBusy
            future: Future[Any] = Future()
            self.calls.append((function, future))
            self.changed.notify()
        return future

    def cancel(self, ticket: Ticket) -> None:
        """Have a row dropped before the next forward; called by any thread."""
        ticket.cancelled = True

    def close(self, drain: bool = True) -> None:
        """Take no more jobs; with `drain`, after those that there are have been written."""
        with self.changed:
            self.closing = True
            if not drain:
                for ticket in [*self.waiting, *(t for t, _, _ in self.running)]:
                    ticket.cancelled = True
            self.changed.notify()
        if self.thread.is_alive():
            self.thread.join()

    def _run(self) -> None:
        try:
            while self._turn():
                pass
        except BaseException as error:
            self.dead = error
        finally:
            with self.changed:
                gone = self.dead or EngineGone()
                left = [*self.waiting, *(t for t, _, _ in self.running)]
                calls = [*self.calls]
            for ticket in left:
                ticket.deliver(Failed(EngineGone()))
            for _, future in calls:
                future.set_exception(EngineGone())
            del gone

    def _turn(self) -> bool:
        with self.changed:
            while not (self.waiting or self.running or self.calls):
                if self.closing:
                    return False
                self.changed.wait()
            calls, self.calls = self.calls, deque()
            new = []
            while self.waiting and len(self.running) + len(new) < self.max_batch:
                new.append(self.waiting.popleft())
        for function, future in calls:
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)
        for ticket in new:
            job = ticket.job
            ticket.started = time.monotonic()
            states = denoise(
                self.checkpoint.model, job.spec, job.canvas, job.options,
                finished=job.stops, draft=self.checkpoint.draft,
            )  # fmt: skip
            self.running.append((ticket, states, job.canvas))
        self.running = [r for r in self.running if self._step(*r)]
        return True

    def _step(self, ticket: Ticket, states: Iterator[Any], canvas: Any) -> bool:
        if ticket.cancelled:
            return False
        try:
            next(states, None)
        except Exception as error:
            ticket.deliver(Failed(error))
            return False
        self.forwards += 1
        job = ticket.job
        begin = begin_of(job)
        certain = max(begin, canvas.certain(0, bool(job.options.remask)))
        fresh = slice(begin + ticket.sent, certain)
        if certain > begin + ticket.sent:
            ticket.deliver(
                Committed(
                    canvas.ids[0, fresh].tolist(),
                    canvas.logprob[0, fresh].tolist(),
                    canvas.step[0, fresh].tolist(),
                    int(canvas.forwards[0]),
                )
            )
        if job.drafts:
            start, end = begin + ticket.sent, int(canvas.total[0])
            if job.options.block_length and job.options.mode == "diffusion":
                end = min(end, int(canvas.start[0]) + job.options.block_length)
            if job.options.mode != "diffusion":
                end = certain
            if canvas.over[0]:
                end = int(canvas.end[0])
            end = max(end, certain)
            s = slice(start, end)
            steps = canvas.step[0, s].tolist()
            ticket.deliver(
                Draft(
                    ticket.sent,
                    canvas.ids[0, s].tolist(),
                    canvas.logprob[0, s].tolist(),
                    steps,
                    [
                        job.options.mode == "speculative" and steps[n + 1 : n + 2] == [x]
                        for n, x in enumerate(steps)
                    ],
                    [],
                    int(canvas.forwards[0]),
                    time.monotonic() - ticket.started,
                )
            )
        ticket.sent = certain - begin
        if not canvas.over[0]:
            return True
        end = int(canvas.end[0])
        stopped = end < int(canvas.total[0]) or int(canvas.ids[0, end - 1]) in canvas.ends
        stopped |= bool(job.stops and job.stops(0, canvas.ids[0, :end]))
        result = result_of(
            self.checkpoint,
            job.spec,
            job.options,
            canvas,
            0,
            time.monotonic() - ticket.started,
            job.segments,
        )
        ticket.deliver(Done("stop" if stopped else "length", result))
        return False


def begin_of(job: Job) -> int:
    """First position that is written: the first gap, or the end of the prompt."""
    given = job.canvas.given[0, : int(job.canvas.prompt[0])]
    return len(given) if bool(given.all()) else int((~given).nonzero()[0])
