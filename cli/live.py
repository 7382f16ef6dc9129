"""Texts on a terminal while they are denoised: what `generate --stream` and `chat` show."""

from __future__ import annotations

import math
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.text import Text

    from ..generation.results import Completion
    from ..generation.writing import Piece, State, Writing

FRAME = 1 / 20  # seconds between two frames at least; more would not be seen
SHARE = 0.02  # of the time that drawing may take
SURE = ((0.9, "green"), (0.5, "yellow"), (0.0, "red"))  # colours by a token's probability
BESIDE = 72  # columns from which two texts stand side by side


def is_live() -> bool:
    """Whether standard output is a terminal that can be drawn on."""
    return sys.stdout.isatty() and not console().is_dumb_terminal


def console() -> Console:
    """Standard output, for texts that are printed as they are."""
    from rich.console import Console

    return Console(highlight=False, emoji=False, markup=False)


class View:
    """Draws texts between the forwards that decide them. The frame vanishes with the view, since
    the finished texts are printed for good, however long they are.

    Args:
        pause: seconds to pause after each forward; every one is drawn then.
    """

    def __init__(self, console: Console, pause: float = 0.0):
        from rich.live import Live

        self.console, self.pause = console, pause
        self.live = Live(console=console, auto_refresh=False, transient=True)
        self.due = 0.0  # when the next frame is
        self.drawn: dict[int, int] = {}  # the last forward of each text that was drawn

    def __enter__(self) -> View:
        self.live.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.live.stop()

    def show(self, writings: Sequence[Writing]) -> None:
        """Draw texts, unless the last frame was a moment ago."""
        start = time.monotonic()
        if start < self.due and not self.pause:
            return
        self.live.update(self.frame([writing.state() for writing in writings]), refresh=True)
        now = time.monotonic()
        self.due = now + max(FRAME, (now - start) / SHARE)
        time.sleep(self.pause)

    def frame(self, states: Sequence[State]) -> RenderableType:
        """The texts side by side, or one below the other on a narrow terminal; only as many lines
        as there is room for."""
        from rich.console import Group
        from rich.table import Table

        width, height = self.console.width, self.console.height - 1
        if len(states) == 1:
            return self.column(states[0], 0, width, height)
        if width < BESIDE:
            part = height // len(states)
            return Group(*(self.column(s, n, width, part) for n, s in enumerate(states)))
        table = Table.grid(padding=(0, 2, 0, 0), expand=True)
        part = width // len(states) - 2
        for _ in states:
            table.add_column(width=part)
        table.add_row(*(self.column(s, n, part, height) for n, s in enumerate(states)))
        return table

    def column(self, state: State, number: int, width: int, height: int) -> RenderableType:
        """A text, and a line on how far it is."""
        from rich.console import Group

        text, first = self.text(state, self.drawn.get(number, 0))
        self.drawn[number] = state.forwards
        below = [*self.lines(figures(state), width), *self.lines(legend(state), width)]
        lines, room = self.lines(text, width), max(1, height - len(below))
        if len(lines) > room:  # around the first undecided token; at the end, once there is none
            middle = len(self.lines(text[:first], width)) - room // 2
            start = max(0, min(middle, len(lines) - room))
            lines = lines[start : start + room]
        return Group(*lines, *below)

    def lines(self, text: Text, width: int) -> list[Text]:
        """A text in lines of a width."""
        return list(text.wrap(self.console, width, overflow="fold"))

    def text(self, state: State, last: int) -> tuple[Text, int]:
        """A text in colours, and where its first undecided token is.

        Args:
            last: the forward after which it was last drawn.
        """
        from rich.text import Text

        plain = self.console.options.ascii_only
        text, first = Text(), None
        for piece in state.pieces:
            if piece.opens:
                text.append("|" if plain else "│", "dim")
            if piece.undecided and first is None:
                first = len(text)
            shown = "." if plain and piece.undecided else harmless(piece.text)
            text.append(shown, style_of(piece, last))
        return text, len(text) if first is None else first


def style_of(piece: Piece, last: int) -> str:
    """Its colour tells how sure the model was of a token; it is bold while it is new."""
    marked = " underline" if piece.drafted or piece.again else ""
    if piece.undecided:
        return "dim" + marked
    if not piece.step:
        return ""
    sure = next(colour for least, colour in SURE if math.exp(piece.logprob) >= least)
    return sure + (" bold" if piece.step > last else "") + marked


def figures(state: State) -> Text:
    """How far a text is, and how fast it is being written."""
    from rich.text import Text

    each = state.new_tokens / max(state.forwards, 1)
    rate = state.new_tokens / max(state.seconds, 1e-9)
    return Text(
        f"{state.mode}: step {state.forwards}, {state.new_tokens} tokens, {each:.2f} per forward, "
        f"{rate:.0f} tokens/s, {state.seconds:.1f} s",
        "bold dim",
    )


def legend(state: State) -> Text:
    """What the colours mean."""
    from rich.text import Text

    text = Text("probability ", "dim")
    for least, colour in SURE:
        text.append(f">{100 * least:.0f} %  " if least else "less", colour)
    if state.mode == "speculative":
        text.append("  ").append("accepted draft", "underline dim")
    if any(piece.again for piece in state.pieces):
        text.append("  ").append("masked again", "underline dim")
    return text


def harmless(text: str) -> str:
    """A text without the characters that move the cursor or change the terminal: control
    characters other than line breaks appear as their pictures, tabs as spaces."""
    if text.isprintable():
        return text
    return "".join(map(_harmless, text))


def _harmless(character: str) -> str:
    if character == "\t":
        return "    "
    code = ord(character)
    if code < 0x20 and character != "\n":
        return chr(0x2400 + code)
    turns = 0x202A <= code <= 0x202E or 0x2066 <= code <= 0x2069  # the direction of writing
    if turns or 0x7F <= code < 0xA0 or code in (0x2028, 0x2029):
        return "\ufffd"
    return character


def print_text(result: Completion) -> None:
    """Print a finished text with its prompt; on a terminal, what fills gaps is highlighted."""
    if not sys.stdout.isatty():
        typer.echo(result.whole_text)
        return
    from rich.text import Text

    text, shown, end = result.whole_text, Text(), 0
    for start, filling in zip(result.filled_at or (), result.filled or (), strict=True):
        shown.append(harmless(text[end:start]))
        end = start + len(filling)
        shown.append(harmless(text[start:end]), "bold green underline")
    console().print(shown.append(harmless(text[end:])))


def remark(*lines: str) -> None:
    """Print lines about a text on stderr, after what stdout has of it."""
    from rich.console import Console

    sys.stdout.flush()
    to = Console(stderr=True, highlight=False, emoji=False, markup=False)
    for line in lines:
        to.print(f"[{line}]", style="dim", soft_wrap=not to.is_terminal)


def draw(writings: Sequence[Writing], stopped: Callable[[], bool], pause: float) -> None:
    """Write texts and draw them meanwhile."""
    from ..generation.writing import in_turn

    with View(console(), pause) as view:
        for _ in in_turn(writings):
            view.show(writings)
            if stopped():
                break


@contextmanager
def interrupts(stop: Callable[[], None]) -> Iterator[None]:
    """Ctrl-C calls `stop`; a second one interrupts what is going on."""
    before = signal.getsignal(signal.SIGINT)

    def once(_number: int, _frame: Any) -> None:
        signal.signal(signal.SIGINT, before)
        stop()

    signal.signal(signal.SIGINT, once)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
