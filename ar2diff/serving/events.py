"""What the engine tells of a row while it is written, and the mailbox in which it lies until
somebody reads it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace

from ..generation.results import Completion


@dataclass(frozen=True)
class Committed:
    """Tokens that are decided for good, and all before them.

    Attributes:
        ids: from the end of the last ones on, the first from the end of the prompt; of a prompt
            with gaps, from the first gap on, with what is given between gaps.
        logprobs: of each in the forward that decided it, in the model's own distribution.
        steps: the row's forward that decided each, from 1; 0 for what is given.
        forwards: of the row until now.
        likeliest: of each, the likeliest tokens in its place and their log-probabilities, none for
            what is given; empty if no alternatives are asked for.
    """

    ids: list[int]
    logprobs: list[float]
    steps: list[int]
    forwards: int
    likeliest: list[list[tuple[int, float]]] = field(default_factory=list)


@dataclass(frozen=True)
class Draft:
    """What a row holds behind a place: tokens that are decided before all to their left are, and
    gaps. It ends with the block that is being denoised.

    Attributes:
        start: number of tokens before it, counted as `Committed` does.
        ids: the mask id where undecided. logprobs, steps: as of `Committed`; 0 where undecided.
        drafted: which tokens were drafted and then accepted by the AR mode.
        refused: tokens that the last forward drafted and the AR mode refused, from where they
            would have stood: behind the last token.
        forwards: of the row until now. seconds: since its first one.
    """

    start: int
    ids: list[int]
    logprobs: list[float]
    steps: list[int]
    drafted: list[bool]
    refused: list[int]
    forwards: int
    seconds: float

    def after(self, earlier: Draft | None) -> Draft:
        """This draft, with what an earlier one, which nobody has read, tells of the tokens before
        it."""
        if earlier is None or earlier.start >= self.start:
            return self
        count = self.start - earlier.start
        names = ("ids", "logprobs", "steps", "drafted")
        both = {name: getattr(earlier, name)[:count] + getattr(self, name) for name in names}
        return replace(self, start=earlier.start, **both)


@dataclass(frozen=True)
class Done:
    """A row is finished.

    Attributes:
        reason: `stop` (an end token, a stop string or a constraint), `length`, or `time` if it was
            cut.
        result: as `generate` would return it.
    """

    reason: str
    result: Completion


@dataclass(frozen=True)
class Failed:
    """A row cannot be finished.

    Attributes:
        error: an `Ar2DiffError` if the request is to blame.
    """

    error: BaseException


Event = Committed | Draft | Done | Failed


class Post:
    """Carries events from the engine's thread to the thread of a loop: all that have come since
    the loop last looked, in one call.

    Args:
        call: has a function called by the loop's thread; a `RuntimeError` says that it is closed.
    """

    def __init__(self, call: Callable[[Callable[[], None]], object]):
        self.call, self.called = call, False
        self.held: deque[tuple[Mailbox, Event]] = deque()

    def put(self, box: Mailbox, event: Event) -> None:
        """Send an event; called by the engine's thread."""
        self.held.append((box, event))
        if not self.called:
            self.called = True
            with suppress(RuntimeError):
                self.call(self.deliver)

    def deliver(self) -> None:
        """Put what has come into the mailboxes; called by the loop's thread."""
        self.called = False
        while self.held:
            box, event = self.held.popleft()
            box.put(event)


class Mailbox:
    """What a reader has not read yet: text, which is kept, and the newest draft.

    It has no lock: `put` and `take` are called by one thread. What it holds is bounded by the
    length of the answer.

    Args:
        ring: called when something has been put.
    """

    def __init__(self, ring: Callable[[], None]):
        self.ring, self.draft = ring, None
        self.events: list[Event] = []

    def put(self, event: Event) -> None:
        """Add an event; a draft replaces the one before it."""
        if isinstance(event, Draft):
            self.draft = event.after(self.draft)
        else:
            self.events.append(event)
        self.ring()

    def take(self) -> list[Event]:
        """All that there is: text first, then the draft, then the end."""
        ends = [e for e in self.events if isinstance(e, Done | Failed)]
        text = [e for e in self.events if isinstance(e, Committed)]
        drafts = [] if self.draft is None else [self.draft]
        self.events, self.draft = [], None
        return [*text, *drafts, *ends]
