"""What a terminal shows of texts while they are denoised, through an emulator of one."""

from __future__ import annotations

import io
import itertools
import os
import pty
import select
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pyte
import pytest
from ar2diff.cli import live
from ar2diff.cli.live import FRAME, SHARE, View, harmless
from ar2diff.cli.main import main
from rich.console import Console

from ar2diff.checkpoint.io import load_checkpoint
from ar2diff.generation.writing import Piece, State, Writing, in_turn

PROMPT = "the cat sat on the mat"
RECORDINGS = Path(__file__).parents[1] / "docs" / "recordings"
HEIGHT = 8
SILENCE = 60  # seconds without output after which a program hangs


@pytest.fixture(scope="module")
def checkpoint(converted):
    return load_checkpoint(str(converted))


def write(checkpoint, prompt=PROMPT, **settings):
    """A writing, and its state after each forward."""
    writing = Writing.of_prompt(checkpoint, prompt, settings)
    states = []
    while writing.step():
        states.append(writing.state())
    return writing, states


def text_of(state):
    return "".join(piece.text for piece in state.pieces)


@pytest.mark.parametrize(
    ("prompt", "settings"),
    (
        (PROMPT, {"mode": "diffusion", "max_new_tokens": 20}),
        (PROMPT, {"mode": "speculative", "draft_length": 3, "max_new_tokens": 20}),
        (PROMPT, {"mode": "ar", "max_new_tokens": 5}),
        ("the {mask:3} sat{mask:2}mat", {}),
        ("the {mask:3} sat", {"max_new_tokens": 9, "steps_per_block": 3, "remask": 0.5}),
    ),
    ids=str,
)
def test_the_last_state_is_the_text(checkpoint, prompt, settings):
    writing, states = write(checkpoint, prompt, **settings)
    result = writing.result()
    assert text_of(states[-1]) == result.whole_text
    assert (states[-1].forwards, states[-1].new_tokens) == (result.forwards, result.new_tokens)
    assert [state.forwards for state in states] == list(range(1, len(states) + 1))
    given = "".join(piece.text for piece in states[0].pieces if not piece.step and not piece.again)
    assert given.replace("·", "").startswith(prompt.split("{")[0])


def test_a_block_opens_where_the_grid_has_a_line(checkpoint):
    writing, states = write(checkpoint, mode="diffusion", max_new_tokens=20)
    place, opening = writing.prompt, []
    for piece in states[-1].pieces[1:]:
        opening += [place] if piece.opens else []
        place += 1
    assert opening == [24, 32, 40]  # blocks of 8
    # The first forward has ended a block; nothing is drawn of those after the next.
    assert len(states[0].pieces) == 1 + 32 - writing.prompt


def test_accepted_drafts_are_those_that_a_forward_writes_beside_its_own_token(checkpoint):
    writing, states = write(checkpoint, mode="speculative", draft_length=3, max_new_tokens=40)
    drafted = sum(piece.drafted for piece in states[-1].pieces)
    assert drafted == writing.result().new_tokens - writing.result().forwards > 0
    _, states = write(checkpoint, mode="ar", max_new_tokens=5)
    assert not any(piece.drafted for piece in states[-1].pieces)


def test_what_is_masked_again_is_marked(checkpoint):
    _, states = write(checkpoint, steps_per_block=4, remask=0.5, max_new_tokens=16)
    was_shown, marked = set(), set()
    for state in states:
        masked = {n for n, piece in enumerate(state.pieces) if piece.undecided}
        marked |= was_shown & masked
        assert {n for n, piece in enumerate(state.pieces) if piece.again} == marked
        was_shown |= {n for n, piece in enumerate(state.pieces) if piece.step}
    assert marked


class Clock:
    """A clock that others move on."""

    def __init__(self):
        self.now, self.slept = 0.0, 0.0

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.slept += seconds


def test_drawing_is_not_the_models_time(checkpoint, monkeypatch):
    clock = Clock()
    monkeypatch.setattr("ar2diff.generation.writing.time", clock)
    writing = Writing.of_prompt(checkpoint, PROMPT, {"mode": "ar", "max_new_tokens": 6})
    states = writing._states

    def slow():
        for state in states:
            clock.now += 2
            yield state

    writing._states = slow()
    while writing.step():
        clock.now += 100  # a slow terminal
    assert writing.result().seconds == 12


def test_two_texts_go_on_at_their_own_speeds():
    class Timed:
        def __init__(self, cost, steps):
            self.cost, self.left, self.seconds = cost, steps, 0.0

        def step(self):
            self.left -= 1
            self.seconds += self.cost if self.left >= 0 else 0
            return self.left >= 0

    slow, fast = Timed(3.0, 4), Timed(1.0, 6)
    for _ in in_turn([slow, fast]):
        assert abs(slow.seconds - fast.seconds) <= 3 or fast.left <= 0
    assert slow.seconds == 12 and fast.seconds == 6


def console(width, height=HEIGHT, **options):
    """A console whose output a screen of its size can read."""
    return Console(
        file=io.StringIO(), force_terminal=True, width=width, height=height, highlight=False,
        color_system="standard", legacy_windows=False, **options,
    )  # fmt: skip


def emulated(console):
    screen = pyte.HistoryScreen(console.width, console.height, history=1000)
    screen.set_mode(pyte.modes.LNM)
    pyte.Stream(screen).feed(console.file.getvalue())
    return screen


def drawn(*texts, mode="diffusion", **figures):
    """Stands for a writing: a state of these pieces."""
    pieces = [piece if isinstance(piece, Piece) else Piece(piece, step=1) for piece in texts]
    figures = {"forwards": 1, "new_tokens": len(pieces), "seconds": 1.0} | figures
    return SimpleNamespace(state=lambda: State(mode, pieces, **figures))


def test_a_frame_is_drawn_as_rarely_as_its_cost_asks_for(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(live, "time", clock)
    view, frames = View(console(80)), []

    def draw(frame, refresh):
        frames.append(clock.now)
        clock.now += 0.01

    monkeypatch.setattr(view.live, "update", draw)
    while clock.now < 20:
        view.show([drawn("a")])
        clock.now += 0.001  # a forward
    assert len(frames) * 0.01 / clock.now < SHARE
    assert min(b - a for a, b in itertools.pairwise(frames)) > FRAME
    assert len(frames) > 30
    shown, view.pause = len(frames), 0.5  # every forward is to be seen then
    for _ in range(5):
        view.show([drawn("a")])
    assert len(frames) == shown + 5 and clock.slept == 2.5


STORY = "Once upon a time, 猫がいました。 naïve 🙂 cats\x1b[2J\x07 said\r\n\n\ttabs " * 6
FINISHED = "".join(harmless(STORY).split())


@pytest.mark.parametrize("width", (40, 80, 120))
def test_frames_stay_within_the_screen_and_leave_nothing_behind(width):
    out = console(width, height=16)
    tokens = [STORY[n : n + 3] for n in range(0, len(STORY), 3)]
    with View(out, pause=1e-9) as view:
        for known in range(0, len(tokens), 5):
            dots = [Piece("·", undecided=True)] * 8
            view.show([drawn(*tokens[:known], *dots, forwards=known)])
            screen = emulated(out)
            assert not screen.history.top  # nothing has scrolled away
            lines = "\n".join(line.rstrip() for line in screen.display)
            assert "········" in lines.replace("\n", "")
            assert f"diffusion: step {known}," in lines.replace("\n", " ")
    out.print(harmless(STORY))
    screen = emulated(out)
    rows = [*("".join(c.data for c in _row(line, width)) for line in screen.history.top)]
    rows += screen.display
    assert "".join("".join(rows).split()) == FINISHED
    assert screen.cursor.x == 0 and not screen.cursor.hidden


def _row(line, width):
    return [line[column] for column in range(width)]


@pytest.mark.parametrize("first", (0, 5, 50, 99))
def test_a_text_longer_than_the_screen_is_shown_where_it_is_undecided(first):
    out = console(40)
    pieces = [f"word{n:02} " for n in range(100)]
    pieces[first] = Piece("·", undecided=True)
    with View(out) as view:
        view.show([drawn(*pieces)])
        assert "·" in "".join(emulated(out).display)
        assert not emulated(out).history.top


def test_a_comparison_stands_side_by_side_where_there_is_room():
    for width, beside in ((40, False), (72, True), (120, True)):
        out = console(width, height=20)
        with View(out) as view:
            view.show([drawn("left", mode="speculative"), drawn("right", mode="ar")])
            lines = emulated(out).display
            assert any("left" in line and "right" in line for line in lines) == beside
            assert all(any(mode in line for line in lines) for mode in ("speculative:", "ar:"))


def test_the_colour_of_a_token_tells_how_sure_it_was():
    styles = {
        live.style_of(Piece("a", step=1, logprob=logprob), last=1) for logprob in (0, -0.5, -3)
    }
    assert styles == {"green", "yellow", "red"}
    assert live.style_of(Piece("a", step=2), last=1) == "green bold"
    assert live.style_of(Piece("a", step=1, drafted=True), last=1) == "green underline"
    assert live.style_of(Piece("·", undecided=True, again=True), last=1) == "dim underline"
    assert live.style_of(Piece("the prompt"), last=0) == ""


def test_no_color_leaves_the_marks(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    out = console(80)
    with View(out) as view:
        view.show([drawn(Piece("sure", step=1, drafted=True), mode="speculative")])
    assert "\x1b[32" not in out.file.getvalue() and "\x1b[33" not in out.file.getvalue()
    assert "\x1b[1;4m" in out.file.getvalue()  # bold, underlined


def test_no_character_of_a_text_moves_the_cursor():
    assert harmless("a\nb 日 é") == "a\nb 日 é"
    assert (
        harmless("\x1b[2J\r\x07\x00\x7f\x9b\u202e\u2028\t.")
        == "␛[2J␍␇␀\ufffd\ufffd\ufffd\ufffd    ."
    )


class Terminal:
    """The command line in a process of its own, at a terminal."""

    def __init__(self, *arguments, columns=80, rows=24):
        self.screen = pyte.HistoryScreen(columns, rows, history=1000)
        self.stream = pyte.ByteStream(self.screen)
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            try:
                sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")
                sys.argv = ["ar2diff", *map(str, arguments)]
                # Processes that a shell starts in the background ignore it.
                signal.signal(signal.SIGINT, signal.default_int_handler)
                os.environ |= {
                    "TERM": "xterm-256color",
                    "COLUMNS": str(columns),
                    "LINES": str(rows),
                }
                main()
            except SystemExit as end:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(end.code or 0)
            os._exit(99)

    @property
    def text(self):
        above = ["".join(c.data for c in _row(line, 80)) for line in self.screen.history.top]
        return "\n".join(line.rstrip() for line in [*above, *self.screen.display]).rstrip()

    def until(self, condition):
        while not condition(self.text):
            assert select.select([self.fd], [], [], SILENCE)[0], self.text
            self.stream.feed(os.read(self.fd, 1 << 14))

    def type(self, keys):
        os.write(self.fd, keys.encode())

    def interrupt(self, condition):
        """Ctrl-C until it shows: a prompt that has just appeared may not listen yet."""
        for _ in range(SILENCE):
            self.type("\x03")
            while not condition(self.text) and select.select([self.fd], [], [], 1)[0]:
                self.stream.feed(os.read(self.fd, 1 << 14))
            if condition(self.text):
                return
        raise AssertionError(self.text)

    def end(self):
        """Read to the end; returns the exit code."""
        try:
            self.until(lambda _: False)
        except OSError:  # nobody is at the other end any more
            pass
        os.close(self.fd)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def test_generate_draws_on_a_terminal_and_prints_the_text_once(run_both, converted):
    arguments = ("generate", converted, "--prompt", "the{mask:3} sat", "--max-new-tokens", 30)
    terminal = Terminal(*arguments, "--stream", "--pause", "0.001")
    terminal.until(lambda text: "diffusion: step 2" in text)
    assert terminal.end() == 0
    code, out, err = run_both(*arguments, "--stream")
    assert code == 0
    assert "\x1b" not in out + err and "\r" not in out + err
    shown = terminal.text.split("[")[0]
    assert "".join(shown.split()) == "".join(harmless(out).split())
    assert terminal.text.count("tokens per forward") == 1 and "step" not in terminal.text


def test_a_pipe_gets_the_text_as_it_is_decided(run_both, converted, monkeypatch):
    pipe, parts = io.StringIO(), []
    write = pipe.write
    pipe.write = lambda text: parts.append(text) or write(text)
    monkeypatch.setattr("sys.stdout", pipe)
    arguments = ("--prompt", PROMPT, "--max-new-tokens", 12, "--compare")
    assert run_both("generate", converted, *arguments, "--mode", "diffusion")[0] == 0
    assert pipe.getvalue().startswith(PROMPT) and pipe.getvalue().count(PROMPT) == 2
    assert len(parts) > 5


def test_ctrl_c_stops_an_answer_and_ctrl_d_the_chat(converted):
    terminal = Terminal("chat", converted, "--max-new-tokens", 400, "--mode", "ar", "--pause", 0.01)
    terminal.until(lambda text: text.endswith(">"))
    terminal.type("the cat \\\n")
    terminal.until(lambda text: text.endswith("."))
    terminal.type("sat\n")
    terminal.until(lambda text: "ar: step 2" in text)
    terminal.type("\x03")
    terminal.until(lambda text: ", stopped]" in text and text.endswith(">"))
    terminal.interrupt(lambda text: "/quit to leave" in text)
    terminal.until(lambda text: text.endswith(">"))
    terminal.type("/show\n")
    terminal.until(lambda text: "exchanges            1 in" in text and text.endswith(">"))
    terminal.type("\x04")
    assert terminal.end() == 0


def test_recordings_ask_for_nothing_from_elsewhere():
    for file in RECORDINGS.glob("*.svg"):
        drawing = file.read_text(encoding="utf-8")
        ElementTree.fromstring(drawing)
        for asks in ("@font-face", "url(http", "href", "<script", "@import"):
            assert asks not in drawing, f"{file.name} has {asks}"
