"""`ar2diff chat`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .live import View, console, harmless, interrupts, is_live
from .output import Dtype, quiet
from .sampler import Pause, with_sampler

if TYPE_CHECKING:
    from ..generation.chat import Chat


@with_sampler
def chat(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a converted model.")],
    system: Annotated[
        str | None, typer.Option(help="System message; needs a model with a chat template.")
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Write each answer in the AR mode too, beside it.")
    ] = False,
    pause: Pause = 0.0,
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

    check_request(model, None, settings, compare)
    session = Chat(load(model, dtype=dtype).checkpoint, settings, system, compare)
    sys.stdin.reconfigure(errors="surrogateescape")  # a line that is not text ends no chat
    live = sys.stdin.isatty() and is_live()
    screen = Screen(pause) if live else Plain()
    for note in session.greeting():
        screen.draw(note)
    for message in _messages(_typed if live else _piped):
        try:
            with interrupts(session.stop):
                if screen.follow(session, message):
                    break
        except KeyboardInterrupt:  # a second Ctrl-C, during a forward
            if not live:
                raise
            screen.say("the answer was dropped")


class Plain:
    """Answers go to stdout, everything else to stderr."""

    def follow(self, session: Chat, message: str) -> bool:
        """Draw what a message leads to; returns whether the chat is over."""
        from ..generation.events import End

        for event in session.events(message):
            if isinstance(event, End):
                return True
            self.draw(event)
        return False

    def draw(self, event: Any) -> None:
        """Draw one event."""
        from ..generation.events import Answer, Note, Problem
        from ..generation.results import summary

        match event:
            case Note(text):
                self.say(text)
            case Problem(what, fix):
                self.say(f"error: {what}\n  fix: {fix}")
            case Answer(result, mode, beside=beside):
                self.answer(result.text)
                self.say(f"[{mode}: {event.summary}]" if beside else f"[{event.summary}]")
                if beside and beside.text != result.text:
                    self.answer(beside.text)
                if beside:
                    same = ", the same text" if beside.text == result.text else ""
                    self.say(f"[ar: {summary([beside])}{same}]")

    def say(self, text: str) -> None:
        """Print a line that is not an answer."""
        print(text, file=sys.stderr, flush=True)

    def answer(self, text: str) -> None:
        """Print an answer."""
        print(text, flush=True)


class Screen(Plain):
    """A terminal that shows answers while they are denoised."""

    def __init__(self, pause: float):
        self.pause, self.console = pause, console()
        self.view: View | None = None  # of the answer that is being written

    def follow(self, session: Chat, message: str) -> bool:
        """Draw what a message leads to; returns whether the chat is over."""
        try:
            return super().follow(session, message)
        finally:
            self._close()

    def draw(self, event: Any) -> None:
        """Draw one event."""
        from ..generation.events import Step

        if not isinstance(event, Step):
            self._close()
            super().draw(event)
            return
        if self.view is None:
            self.view = View(self.console, self.pause).__enter__()
        self.view.show(event.writings)

    def _close(self) -> None:
        if self.view is not None:
            self.view.__exit__()
            self.view = None

    def say(self, text: str) -> None:
        """Print a line that is not an answer."""
        self.console.print(harmless(text), style="dim")

    def answer(self, text: str) -> None:
        """Print an answer."""
        self.console.print(harmless(text))


def _messages(read: Callable[[str], str | None]) -> Iterator[str]:
    """Messages of one or more lines: one that ends in a backslash goes on in the next.

    Args:
        read: a line after a prompt; None if it was called off. EOFError ends the messages.
    """
    from ..generation.chat import MORE

    held: list[str] = []
    while True:
        try:
            line = read(". " if held else "> ")
        except EOFError:
            break
        held = [] if line is None else [*held, line.removesuffix(MORE)]
        if line is not None and not line.endswith(MORE):
            yield "\n".join(held)
            held = []
    if held:
        yield "\n".join(held)


def _piped(_prompt: str) -> str:
    """A line of standard input that is no terminal."""
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.rstrip("\n")


def _typed(prompt: str) -> str | None:
    """A line typed at a prompt, with the editing keys of readline."""
    try:
        import readline  # noqa: F401
    except ImportError:  # not on every system
        pass
    try:
        return input(prompt)
    except EOFError:
        print()
        raise
    except KeyboardInterrupt:
        print("\n(press Ctrl-D or type /quit to leave)")
        return None
