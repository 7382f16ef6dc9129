"""Texts on a terminal while they are denoised: what `generate --stream` and `chat` show."""

from __future__ import annotations

import math
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, groupby, zip_longest
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions
    from rich.segment import Segment
    from rich.text import Text

    from ..generation.results import Completion
    from ..generation.writing import Piece, State, Writing

FRAME = 1 / 20  # seconds between two frames at least; more would not be seen
SHARE = 0.03  # of the time that drawing may take
SURE = ((0.9, "green"), (0.5, "yellow"), (0.0, "red"))  # colours by a token's probability
BESIDE = 72  # columns from which two texts stand side by side
APART = 2  # columns between them


def is_live() -> bool:
    """Whether standard output is a terminal that can be drawn on."""
    return sys.stdout.isatty() and not console().is_dumb_terminal


def console() -> Console:
    """Standard output, for texts that are printed as they are."""
    from rich.console import Console

    return Console(highlight=False, emoji=False, markup=False)


@dataclass(frozen=True)
class Frame:
    """Lines that are as long as they should be, which rich need not wrap again."""

    lines: Sequence[Text]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        """What rich prints."""
        for line in self.lines:
            yield from line.render(console, end="\n")


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

    def frame(self, states: Sequence[State]) -> Frame:
        """The texts side by side, or one below the other on a narrow terminal; only as many lines
        as there is room for."""
        from rich.text import Text

        width = self.console.width
        below = self.lines(legend(states), width)
        height = self.console.height - 1 - len(below)
        if len(states) > 1 and width < BESIDE:
            height //= len(states)
        elif len(states) > 1:
            width = (width - APART) // len(states)
        columns = [self.column(s, n, width, height) for n, s in enumerate(states)]
        if width == self.console.width:
            return Frame([*chain(*columns), *below])
        lines = []
        for parts in zip_longest(*columns, fillvalue=Text()):
            for part in parts[:-1]:
                part.pad_right(width + APART - part.cell_len)
            lines.append(Text().join(parts))
        return Frame([*lines, *below])

    def column(self, state: State, number: int, width: int, height: int) -> list[Text]:
        """A text, and a line on how far it is."""
        text, first = self.text(state, self.drawn.get(number, 0))
        self.drawn[number] = state.forwards
        below = self.lines(figures(state), width)
        lines, room = self.lines(text, width), max(1, height - len(below))
        if len(lines) > room:  # around the first undecided token; at the end, once there is none
            middle = len(self.lines(text[:first], width)) - room // 2
            start = max(0, min(middle, len(lines) - room))
            lines = lines[start : start + room]
        return [*lines, *below]

    def lines(self, text: Text, width: int) -> list[Text]:
        """A text in lines of a width."""
        return list(text.wrap(self.console, width, overflow="fold"))

    def text(self, state: State, last: int) -> tuple[Text, int]:
        """A text in colours, and where its first undecided token is.

        Args:
            last: the forward after which it was last drawn.
        """
        from rich.text import Text

        dot, line = (".", "|") if self.console.options.ascii_only else ("·", "│")
        parts, first = [], None
        for piece in state.pieces:
            if piece.opens:
                parts.append(("dim", line))
            if piece.undecided and first is None:
                first = len(parts)
            shown = dot if piece.undecided else harmless(piece.text)
            parts.append((style_of(piece, last), shown))
        length = sum(len(shown) for _, shown in parts[:first])
        text = Text()
        for style, run in groupby(parts, key=itemgetter(0)):  # fewer spans are drawn faster
            text.append("".join(shown for _, shown in run), style)
        return text, length


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
    return Text().append(
        f"{state.mode}: step {state.forwards}, {state.new_tokens} tokens, {each:.2f} per forward, "
        f"{rate:.0f} tokens/s, {state.seconds:.1f} s",
        "bold dim",
    )


def legend(states: Sequence[State]) -> Text:
    """What the colours mean."""
    from rich.text import Text

    text = Text().append("probability ", "dim")
    for least, colour in SURE:
        text.append(f">{100 * least:.0f} %  " if least else "less", colour)
    if any(state.mode == "speculative" for state in states):
        text.append("  ").append("accepted draft", "underline dim")
    if any(piece.again for state in states for piece in state.pieces):
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
