"""What commands show on a terminal, as SVG files in `docs/recordings`: `make recordings`.

Each command runs in a pseudo-terminal of so many columns; what an emulator (pyte) has on its screen
then is exported by rich, without a web font.

  python benchmarks/recordings.py                    all of them, the models that they need included
  python benchmarks/recordings.py generate chat      some of them
"""

from __future__ import annotations

import argparse
import fcntl
import io
import os
import pty
import re
import select
import shlex
import struct
import subprocess
import sys
import termios
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyte
from rich.console import Console
from rich.style import Style
from rich.table import Table
from rich.text import Text

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "docs" / "recordings"
WORK = ROOT / "runs" / "recordings"
PROMPT = ">"  # a line that holds it alone waits for one to be typed
FONT = re.compile(r"\s*@font-face \{.*?\}", re.DOTALL)


@dataclass(frozen=True)
class Recording:
    """A command to record.

    Attributes:
        name: of the verb.
        command: as a user types it.
        typed: lines to type, each at a prompt.
        frames: how many frames of a text that is being denoised to show before the end.
        rows: of the terminal.
        widths: columns of the terminals to record it in; they are in the names of the files, if
            there are several.
    """

    name: str
    command: str
    typed: tuple[str, ...] = ()
    frames: int = 0
    rows: int = 50
    widths: tuple[int, ...] = (80, 120)


TRAIN = "--overwrite --output-dir"
# In this order: later ones use the models of earlier ones.
RECORDINGS = (
    Recording(
        "adapt",
        f"ar2diff adapt model --recipe demo --data stories.jsonl {TRAIN} adapted",
    ),
    Recording(
        "draft",
        "ar2diff draft model --recipe draft-demo --data stories.jsonl --max-steps 40 "
        f"{TRAIN} drafts",
    ),
    Recording(
        "sft",
        f"ar2diff sft adapted --recipe demo-easy --data easy.jsonl --max-steps 40 {TRAIN} tuned",
    ),
    Recording(
        "rl", f"ar2diff rl tuned --recipe demo-rl --data hard.jsonl --max-steps 15 {TRAIN} rewarded"
    ),
    Recording(  # the README begins with it
        "generate",
        'ar2diff generate adapted --threshold 0.9 --stream --pause 0.3 --prompt "Mia liked to play '
        "in the park. It had rained all night. In her bag Mia had 5 balls. She found 1 more ball "
        'by the swing.\nQuestion: How many balls does Mia have now?\nAnswer:"',
        frames=3,
        rows=16,
        widths=(90,),
    ),
    Recording(
        "generate",
        'ar2diff generate draft --prompt "One day Mia was in the garden." --max-new-tokens 64 '
        "--draft-length 7 --stream --compare --pause 0.2",
        frames=2,
        rows=16,
    ),
    Recording(
        "chat",
        "ar2diff chat draft --max-new-tokens 48",
        typed=("Tom has 3 apples.", "/mode ar", "/hepl", "/quit"),
    ),
)


class Screen(pyte.HistoryScreen):
    """A terminal that shows dim characters in grey, which pyte would show like any others."""

    def select_graphic_rendition(self, *attributes: int) -> None:
        if not {38, 48} & set(attributes):  # else the 2 belongs to a colour
            attributes = tuple(90 if number == 2 else number for number in attributes)
        super().select_graphic_rendition(*attributes)


def record(recording: Recording, columns: int) -> list[Text]:
    """The screens that a command leaves: the last one, or frames on the way.

    Args:
        columns: of the terminal.
    """
    screen = Screen(columns, recording.rows, history=10_000)
    frames: list[Text] = []
    _run(recording, columns, screen, lambda: frames.append(_seen(screen)))
    if not recording.frames:
        return [_seen(screen)]
    frames = frames[:-1] or frames  # the last one is what is printed for good
    count = min(recording.frames, len(frames))
    return [frames[(n + 1) * len(frames) // (count + 1)] for n in range(count)] + [_seen(screen)]


def _run(
    recording: Recording, columns: int, screen: pyte.Screen, paused: Callable[[], None]
) -> None:
    """Run a command in a pseudo-terminal, until it ends.

    Args:
        paused: called whenever it has drawn something.
    """
    own, other = pty.openpty()
    fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", recording.rows, columns, 0, 0))
    stream, typed = pyte.ByteStream(screen), list(recording.typed)
    process = subprocess.Popen(
        shlex.split(recording.command), stdin=other, stdout=other, stderr=other, cwd=WORK,
        env=_environment(), start_new_session=True,
    )  # fmt: skip
    os.close(other)
    seen = False
    while True:
        if select.select([own], [], [], 0.05)[0]:
            try:
                stream.feed(os.read(own, 1 << 16))
            except OSError:  # the program has ended
                break
            seen = True
        elif seen:
            paused()
            seen = False
        elif typed and screen.display[screen.cursor.y].strip() == PROMPT:
            os.write(own, (typed.pop(0) + "\n").encode())
    os.close(own)
    if process.wait():
        raise SystemExit(f"error: this failed: {recording.command}\n{_seen(screen).plain}")


def _environment() -> dict[str, str]:
    """A colour terminal, and this environment's own commands first."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    kept = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLUMNS")}
    return {**kept, "TERM": "xterm-256color", "PYTHONUTF8": "1", "PATH": path}


def _seen(screen: pyte.HistoryScreen) -> Text:
    """What is on a screen and was scrolled off its top, without the empty lines at the end."""
    lines = [*screen.history.top, *(screen.buffer[row] for row in range(screen.lines))]
    text = Text()
    for number, line in enumerate(lines):
        text.append("\n" if number else "")
        for column in range(screen.columns):
            character = line[column]
            style = Style(
                color=_colour(character.fg),
                bgcolor=_colour(character.bg),
                bold=character.bold,
                italic=character.italics,
                underline=character.underscore,
                reverse=character.reverse,
            )
            text.append(character.data, style)
    text.rstrip()
    return text


def _colour(name: str) -> str | None:
    if name == "default":
        return None
    if re.fullmatch("[0-9a-f]{6}", name):
        return f"#{name}"
    return name.replace("brown", "yellow").replace("bright", "bright_")


def svg(frames: Sequence[Text], columns: int, command: str) -> str:
    """A command and its frames, one below the other, as an SVG that asks for nothing from
    elsewhere."""
    console = Console(record=True, width=columns, file=io.StringIO(), legacy_windows=False)
    table = Table.grid(expand=True)
    table.add_row(Text(f"$ {command}", "bold"))
    for number, frame in enumerate(frames):
        if number:
            table.add_row(Text("─" * columns, "dim"))
        table.add_row(Text("\n").join(frame.split("\n")))
    console.print(table)
    drawn = FONT.sub("", console.export_svg(title="ar2diff", unique_id="ar2diff"))
    return "\n".join(line.rstrip() for line in drawn.splitlines()) + "\n"


def prepare() -> None:
    """The models that the package ships, and generated data, under short names."""
    from ar2diff.demo.corpus import write_stories

    WORK.mkdir(parents=True, exist_ok=True)
    for name in ("model", "draft"):
        (WORK / name).unlink(missing_ok=True)
        (WORK / name).symlink_to(ROOT / "ar2diff" / "demo" / name)
    if not (WORK / "stories.jsonl").exists():
        write_stories(WORK / "stories.jsonl", 6000)
    for name, options in (
        ("easy", "--levels 1 --largest 0 10"),
        ("hard", "--levels 2 --largest 11 20 --seed 7"),
    ):
        command = [sys.executable, "-m", "ar2diff.demo.answers", f"{name}.jsonl", *options.split()]
        subprocess.run(command, cwd=WORK, check=True)


def main() -> None:
    names = list(dict.fromkeys(recording.name for recording in RECORDINGS))
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(names))
    asked = parser.parse_args().names or names
    if unknown := set(asked) - set(names):
        parser.error(f"there is no recording {min(unknown)}; there are {', '.join(names)}")
    prepare()
    OUT.mkdir(parents=True, exist_ok=True)
    for recording in RECORDINGS:
        for columns in recording.widths if recording.name in asked else ():
            frames = record(recording, columns)
            several = f"-{columns}" if len(recording.widths) > 1 else ""
            file = OUT / f"{recording.name}{several}.svg"
            file.write_text(svg(frames, columns, recording.command), encoding="utf-8")
            print(file.relative_to(ROOT), flush=True)


if __name__ == "__main__":
    main()
