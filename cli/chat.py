"""`ar2diff chat`."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .output import Dtype, quiet
from .sampler import with_sampler

if TYPE_CHECKING:
    from ..generation.chat import Chat
    from ..generation.events import State

FRAME = 1 / 30  # seconds; faster frames would not be seen
UNDECIDED, FRESH = "dim", "bold green"


@with_sampler
def chat(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a converted model.")],
    system: Annotated[
        str | None, typer.Option(help="System message; needs a model with a chat template.")
    ] = None,
    pause: Annotated[
        float, typer.Option(min=0, help="Seconds to pause after each forward pass, to watch it.")
    ] = 0.0,
    dtype: Dtype = "auto",
    *,
    settings: dict[str, Any],
) -> None:
    """Chat with a converted model and watch it denoise. Without a terminal, each line of standard
    input is answered.

    Example: ar2diff chat runs/demo --temperature 0.7 --pause 0.05
    """
    quiet()
    from .. import load
    from ..generation.chat import Chat
    from ..generation.complete import check_request

    check_request(model, None, settings)
    session = Chat(load(model, dtype=dtype).checkpoint, settings, system)
    sys.stdin.reconfigure(errors="surrogateescape")  # a line that is not text ends no chat
    live = sys.stdin.isatty() and sys.stdout.isatty()
    screen = Screen(session.checkpoint.tokenizer, pause) if live else Plain()
    for note in session.greeting():
        screen.draw(note)
    for line in _typed() if live else sys.stdin:
        with _interrupts(session.stop):
            if screen.follow(session, line.rstrip("\n")):
                break


class Plain:
    """Answers go to stdout, everything else to stderr."""

    def follow(self, session: Chat, line: str) -> bool:
        """Draw what a line leads to; returns whether the chat is over."""
        from ..generation.events import End

        for event in session.events(line):
            if isinstance(event, End):
                return True
            self.draw(event)
        return False

    def draw(self, event: Any) -> None:
        """Draw one event."""
        from ..generation.events import Answer, Note, Problem

        match event:
            case Note(text):
                self.say(text)
            case Problem(what, fix):
                self.say(f"error: {what}\n  fix: {fix}")
            case Answer():
                self.answer(event.text)
                self.say(f"[{event.summary}]")

    def say(self, text: str) -> None:
        """Print a line that is not an answer."""
        print(text, file=sys.stderr, flush=True)

    def answer(self, text: str) -> None:
        """Print an answer."""
        print(text, flush=True)


class Screen(Plain):
    """A terminal that shows answers while they are denoised."""

    def __init__(self, tokenizer: Any, pause: float):
        from rich.console import Console

        self.tokenizer, self.pause = tokenizer, pause
        self.console = Console(highlight=False, emoji=False, markup=False)
        self.drawn, self.last = 0.0, 0  # when a state was last drawn, and its forward

    def follow(self, session: Chat, line: str) -> bool:
        """Draw what a line leads to; returns whether the chat is over."""
        from rich.live import Live

        self.drawn, self.last = 0.0, 0
        # Transient: the finished answer is printed once and for all, however long it is.
        with Live(console=self.console, auto_refresh=False, transient=True) as self.view:
            return super().follow(session, line)

    def draw(self, event: Any) -> None:
        """Draw one event."""
        from ..generation.events import Answer, State

        if isinstance(event, State):
            self.step(event)
            return
        if isinstance(event, Answer):
            self.view.update("", refresh=True)
        super().draw(event)

    def step(self, state: State) -> None:
        """Draw an answer after a forward; only its last lines if it is long."""
        time.sleep(self.pause)
        if time.monotonic() - self.drawn < FRAME:
            return
        from rich.console import Group

        lines = self.text(state).wrap(self.console, self.console.width)
        self.view.update(Group(*lines[-max(1, self.console.height - 2) :]), refresh=True)
        self.drawn, self.last = time.monotonic(), state.forward

    def text(self, state: State) -> Any:
        """The tokens of a state: dots for undecided ones, bright if new on the screen."""
        from rich.text import Text

        from ..generation.tokens import draw_tokens

        text = Text()
        pieces = draw_tokens(self.tokenizer, state.ids, state.mask_token_id)
        for piece, token, step in zip(pieces, state.ids, state.steps, strict=True):
            fresh = FRESH if step > self.last else ""
            text.append(piece, UNDECIDED if token == state.mask_token_id else fresh)
        return text

    def say(self, text: str) -> None:
        """Print a line that is not an answer."""
        self.console.print(text, style="dim")

    def answer(self, text: str) -> None:
        """Print an answer."""
        self.console.print(text)


def _typed() -> Iterator[str]:
    """Lines typed at a prompt, with the editing keys of readline."""
    try:
        import readline  # noqa: F401
    except ImportError:  # not on every system
        pass
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n(press Ctrl-D or type /quit to leave)")


@contextmanager
def _interrupts(stop: Callable[[], None]) -> Iterator[None]:
    """Ctrl-C calls `stop`; a second one interrupts the program."""
    before = signal.getsignal(signal.SIGINT)

    def once(_number: int, _frame: Any) -> None:
        signal.signal(signal.SIGINT, before)
        stop()

    signal.signal(signal.SIGINT, once)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
