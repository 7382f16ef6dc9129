"""A conversation: lines go in, events come out. To draw them is the command line's business."""

from __future__ import annotations

import difflib
import shlex
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.model import Checkpoint
from ..core.canvas import Canvas
from ..core.errors import Ar2DiffError, first_line
from ..core.generate import room_of
from ..core.options import FILTERS, Options
from ..core.spec import Spec
from .complete import begin, encode, settings_of, text_behind
from .prompts import write_results

ALIASES = {"cache": "cache_implementation", "stop": "stop_strings"}
SETTINGS = (
    "mode", "max_new_tokens", "min_new_tokens", "block_length", "threshold", "steps",
    "entropy_bound", "order", "remask", "cfg_scale", "draft_length", "cache", "temperature",
    *FILTERS, "repetition_penalty", "stop", "max_time", "seed",
)  # fmt: skip
COMMANDS = {
    "help": ("/help", "these lines"),
    "reset": ("/reset", "forget the conversation"),
    "set": ("/set key=value ...", "an option of the sampler; key= takes it back"),
    "show": ("/show", "the options in force, and how full the context is"),
    "mode": ("/mode NAME", "diffusion, speculative or ar"),
    "seed": ("/seed N", "of the draws"),
    "undo": ("/undo", "forget the last answer and what it answers"),
    "save": ("/save FILE", "write the conversation as JSON"),
    "quit": ("/quit", "end; so does Ctrl-D"),
}


@dataclass(frozen=True)
class Note:
    """A line about the conversation."""

    text: str


@dataclass(frozen=True)
class Problem:
    """A mistake of the user: what is wrong, and what to do about it."""

    what: str
    fix: str


@dataclass(frozen=True)
class State:
    """An answer that is being written, after a forward.

    Attributes:
        ids: its tokens up to the end of the block that is denoised; masks where undecided.
        steps: the forward at which each was decided.
        forward: the last forward.
        mask_token_id: which id is undecided.
    """

    ids: list[int]
    steps: list[int]
    forward: int
    mask_token_id: int


@dataclass(frozen=True)
class Answer:
    """A finished answer; `stopped` by the user, or `ended` by the model, or full."""

    text: str
    new_tokens: int
    forwards: int
    seconds: float
    stopped: bool
    ended: bool

    @property
    def summary(self) -> str:
        """Its figures, in a line."""
        return (
            f"{self.new_tokens} tokens, {self.forwards} forwards, "
            f"{self.new_tokens / max(self.forwards, 1):.2f} tokens per forward, "
            f"{self.new_tokens / max(self.seconds, 1e-9):.0f} tokens/s"
            + (", stopped" if self.stopped else "")
        )


@dataclass(frozen=True)
class End:
    """The user leaves."""


Event = Note | Problem | State | Answer | End


@dataclass(frozen=True)
class Turn:
    """What the user said, and the answer."""

    said: str
    answer: str
    ended: bool


class Chat:
    """A conversation with a model: by its chat template, or, where it has none, a text that the two
    go on with in turn.

    Args:
        settings: options of `generate`.
        system: a first message, for a template.

    Raises:
        Ar2DiffError: a setting, or a system message without a template.
    """

    def __init__(self, checkpoint: Checkpoint, settings: dict[str, Any], system: str | None = None):
        self.checkpoint, self.settings, self.system = checkpoint, dict(settings), system
        self.templated = bool(checkpoint.tokenizer.chat_template)
        self.turns: list[Turn] = []
        self.dropped = 0  # oldest turns that the context has no room for
        self._stop = False
        if system is not None and not self.templated:
            raise Ar2DiffError(
                "the tokenizer has no chat template, so there is no system message",
                "leave --system out",
            )
        settings_of(checkpoint, self.settings)

    def greeting(self) -> list[Note]:
        """What to say at first."""
        notes = [Note("/help lists the commands; Ctrl-C stops an answer, Ctrl-D ends")]
        if not self.templated:
            notes.insert(
                0,
                Note("no chat template: the model goes on with your text (an empty line: go on)"),
            )
        return notes

    def stop(self) -> None:
        """Stop the current answer after its next forward; what is decided stays."""
        self._stop = True

    def events(self, line: str) -> Iterator[Event]:
        """What a line of the user leads to."""
        try:
            if line.startswith("/") and not line.startswith("//"):
                yield from self._command(line[1:])
            else:
                yield from self._answer(line.removeprefix("/") if line[:2] == "//" else line)
        except Ar2DiffError as error:
            what, fix = error.what.removeprefix("generate: "), error.fix
            for short, name in ALIASES.items():
                what, fix = what.replace(name, short), fix.replace(name, short)
            yield Problem(what, fix)

    # Answers

    def _answer(self, line: str) -> Iterator[Event]:
        if not line.strip() and (self.templated or not self.turns):
            yield Note("write something, or /help")
            return
        spec, options = settings_of(self.checkpoint, self.settings)
        ids, new, notes = self._fit(line, spec, options)
        yield from notes
        spec, options = settings_of(self.checkpoint, {**self.settings, "max_new_tokens": new})
        canvas, states = begin(self.checkpoint, spec, options, [ids])
        self._stop, seconds, start = False, 0.0, time.monotonic()
        for _ in states:
            seconds += time.monotonic() - start
            yield _state(canvas, options)
            if self._stop:
                break
            start = time.monotonic()  # without the time that drawing took
        answer = self._finish(ids, canvas, seconds)
        if answer.new_tokens:
            self.turns.append(Turn(line, answer.text, answer.ended))
        yield answer
        if answer.ended and not self.templated:
            yield Note("the text has ended; what you write next begins another")

    def _finish(self, ids: list[int], canvas: Canvas, seconds: float) -> Answer:
        new = canvas.new_ids(0)
        return Answer(
            text=text_behind(self.checkpoint.tokenizer, ids, new),
            new_tokens=len(new),
            forwards=int(canvas.forwards[0]),
            seconds=seconds,
            stopped=not bool(canvas.done[0]),
            ended=bool(new) and new[-1] in canvas.end_ids.tolist(),
        )

    def _fit(self, line: str, spec: Spec, options: Options) -> tuple[list[int], int, list[Note]]:
        """Ids to answer, how many tokens there is room for, and what to say about it. The oldest
        turns are dropped until half of the context is left for an answer that asks for as much."""
        room, want = room_of(self.checkpoint.model, spec, options), options.max_new_tokens
        before = self.dropped
        ids = self._ids(line, spec)
        while room and len(ids) + min(want, room // 2) > room and self.dropped < len(self.turns):
            self.dropped += 1
            ids = self._ids(line, spec)
        notes = []
        if self.dropped > before:
            notes.append(
                Note(f"the context of {room} tokens is full: dropped the oldest turns, "
                     f"{self.dropped - before} more")
            )  # fmt: skip
        new = want if room is None else min(want, room - len(ids))
        if new < 1:
            raise Ar2DiffError(
                f"your text has {len(ids)} tokens, the context {room}", "write a shorter one"
            )
        if new < want:
            notes.append(Note(f"there is room for {new} tokens, not {want}"))
        return ids, new, notes

    def _ids(self, line: str, spec: Spec) -> list[int]:
        turns = self.turns[self.dropped :]
        if not self.templated:
            return encode(self.checkpoint, spec, [_text([*turns, Turn(line, "", False)])])
        messages = [*self._messages(turns), {"role": "user", "content": line}]
        try:
            encoded = self.checkpoint.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=True
            )
        except Exception as error:  # a template raises what it likes
            raise Ar2DiffError(
                f"the chat template refuses the conversation ({first_line(error)})", "see /undo"
            ) from error
        if spec.mask_token_id in encoded["input_ids"]:
            raise Ar2DiffError("your text spells the mask token", "write something else")
        return encoded["input_ids"]

    def _messages(self, turns: list[Turn]) -> list[dict[str, str]]:
        messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        for turn in turns:
            messages.append({"role": "user", "content": turn.said})
            messages.append({"role": "assistant", "content": turn.answer})
        return messages

    # Commands

    def _command(self, line: str) -> Iterator[Event]:
        name, _, rest = line.strip().partition(" ")
        if name not in COMMANDS:
            near = difflib.get_close_matches(name, COMMANDS, 1)
            raise Ar2DiffError(
                f"there is no command /{name}",
                f"did you mean /{near[0]}?" if near else "see /help; // begins a text with /",
            )
        yield from getattr(self, f"_{name}")(rest.strip())

    def _help(self, _rest: str) -> Iterator[Event]:
        yield Note("\n".join(f"{usage:20} {text}" for usage, text in COMMANDS.values()))

    def _reset(self, _rest: str) -> Iterator[Event]:
        self.turns, self.dropped = [], 0
        yield Note("forgotten")

    def _undo(self, _rest: str) -> Iterator[Event]:
        if not self.turns:
            raise Ar2DiffError("there is nothing to undo", "say something first")
        turn = self.turns.pop()
        self.dropped = min(self.dropped, len(self.turns))
        yield Note(f"forgotten: {turn.said!r} and its answer")

    def _mode(self, rest: str) -> Iterator[Event]:
        yield from self._change({"mode": rest})

    def _seed(self, rest: str) -> Iterator[Event]:
        yield from self._change({"seed": _value("seed", rest)})

    def _set(self, rest: str) -> Iterator[Event]:
        yield from self._change(parse_settings(rest))

    def _change(self, values: dict[str, Any]) -> Iterator[Event]:
        values = {ALIASES.get(name, name): value for name, value in values.items()}
        merged = {**self.settings, **values}
        merged = {name: value for name, value in merged.items() if value is not None}
        settings_of(self.checkpoint, merged)
        self.settings = merged
        yield Note(", ".join(f"{n} {'as before' if v is None else v}" for n, v in values.items()))

    def _show(self, _rest: str) -> Iterator[Event]:
        spec, options = settings_of(self.checkpoint, self.settings)
        lines = [f"{self.checkpoint.path}: {spec.attention} attention"]
        for name in SETTINGS:
            key = ALIASES.get(name, name)
            value = dict(options.filters).get(key) if key in FILTERS else getattr(options, key)
            if value is not None and value != ():
                lines.append(f"{name:20} {value}{'  (yours)' if key in self.settings else ''}")
        turns = self.turns[self.dropped :]
        room = room_of(self.checkpoint.model, spec, options)
        lines.append(f"{'turns':20} {len(turns)} in a context of {room or 'any number of'} tokens")
        yield Note("\n".join(lines))

    def _save(self, rest: str) -> Iterator[Event]:
        if not rest:
            raise Ar2DiffError("/save needs a file", "write /save chat.json")
        path = Path(rest).expanduser()
        if path.exists():
            raise Ar2DiffError(f"{path} exists", "give another name")
        write_results(path, [{"messages": self._messages(self.turns)}])
        yield Note(f"wrote {path}")

    def _quit(self, _rest: str) -> Iterator[Event]:
        yield End()


def parse_settings(text: str) -> dict[str, Any]:
    """Settings from "key=value key=value"; None where a value is empty.

    Raises:
        Ar2DiffError: no such key, or no value.
    """
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise Ar2DiffError(f"/set {text}: {first_line(error)}", "close the quotes") from None
    values = {}
    for word in words:
        name, equals, value = word.partition("=")
        name = name.replace("-", "_")
        if not equals:
            raise Ar2DiffError(f"{word!r} is not key=value", "write for example /set threshold=0.8")
        if name not in SETTINGS and name not in ALIASES.values():
            near = difflib.get_close_matches(name, SETTINGS, 1)
            raise Ar2DiffError(
                f"there is no option {name!r}",
                f"did you mean {near[0]}?" if near else f"one of {', '.join(SETTINGS)}",
            )
        values[name] = _value(name, value)
    if not values:
        raise Ar2DiffError("/set needs key=value", "write for example /set threshold=0.8")
    return values


def _value(name: str, text: str) -> Any:
    if not text:
        return None
    if ALIASES.get(name, name) == "stop_strings":
        return [text.replace("\\n", "\n")]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text  # an option that wants a number refuses it


def _text(turns: list[Turn]) -> str:
    """The text that user and model write in turn; one that has ended is not gone on with."""
    text, ended = "", False
    for turn in turns:
        text = "" if ended else text
        apart = not text or not turn.said or text[-1].isspace() or turn.said[0].isspace()
        text += ("" if apart else " ") + turn.said + turn.answer
        ended = turn.ended
    return text


def _state(canvas: Canvas, options: Options) -> State:
    start, end = int(canvas.prompt[0]), int(canvas.total[0])
    if canvas.done[0]:
        end = int(canvas.end[0])
    elif options.mode != "diffusion":
        end = start + len(canvas.new_ids(0))
    elif options.block_length:
        end = min(end, int(canvas.start[0]) + options.block_length)
    return State(
        ids=canvas.ids[0, start:end].tolist(),
        steps=canvas.step[0, start:end].tolist(),
        forward=int(canvas.forwards[0]),
        mask_token_id=canvas.mask_token_id,
    )
