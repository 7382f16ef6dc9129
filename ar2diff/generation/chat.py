"""A conversation: lines go in, events come out. Drawing them is left to the command line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.model import Checkpoint
from ..core.errors import Ar2DiffError, check_text, first_line, nearest, option, shortened
from ..core.generate import room_of
from ..core.options import FILTERS, Options
from ..core.spec import Spec
from .chat_settings import ALIASES, SETTINGS, as_setting, parse_settings, value_of
from .complete import check_compare, decode_rows, settings_of
from .events import Answer, End, Event, Note, Problem, Step
from .images import album_of, encode_prompt, key_of, with_keys
from .prompts import IMAGE
from .results import Completion, write_results
from .tokens import encode_messages
from .writing import Writing, in_turn, with_ar_beside

COMMANDS = {
    "help": ("/help", "show this list"),
    "image": ("/image FILE", "attach an image to your next message; /image alone: none"),
    "reset": ("/reset", "forget the conversation"),
    "set": ("/set key=value ...", "set sampler options; key= restores the default"),
    "show": ("/show", "show the current options and the size of the context"),
    "mode": ("/mode NAME", "switch to diffusion, speculative or ar; /mode alone: the default"),
    "compare": ("/compare", "show the AR mode's answer beside each one; again: no longer"),
    "seed": ("/seed N", "seed the random draws"),
    "undo": ("/undo", "forget the last message and its answer"),
    "save": ("/save FILE", "write the conversation as JSON"),
    "quit": ("/quit", "leave; so does Ctrl-D"),
}
# What other programs call a command.
MEANT = {"exit": "quit", "q": "quit", "bye": "quit", "clear": "reset", "new": "reset"}
MORE = "\\"  # at the end of a line
GOES_ON = (f"... {MORE}", "a message goes on in the next line")


@dataclass(frozen=True)
class Exchange:
    """What the user said, and the answer.

    Attributes:
        ended: the model ended the answer itself.
        images: files of those that the message begins with.
    """

    said: str
    answer: str
    ended: bool
    images: tuple[str, ...] = ()

    @property
    def content(self) -> str | list[dict[str, Any]]:
        """What the user said, as a message holds it."""
        if not self.images:
            return self.said
        parts = [{"type": "image", "image": image} for image in self.images]
        return [*parts, {"type": "text", "text": self.said}]


def complete_chat(
    checkpoint: Checkpoint, messages: Sequence[dict[str, Any]], **settings: Any
) -> Completion:
    """The model's answer to a conversation, by the tokenizer's chat template.

    Args:
        messages: dicts with `role` and `content`, a text or a list of parts, of which some may be
            images, as of `key_of`; the last is the one to answer.
        settings: options of `generate`.

    Raises:
        Ar2DiffError: an option is wrong, the template is missing or rejects the messages, or they
            do not fit.
    """
    spec, options = settings_of(checkpoint, settings)
    album = album_of(checkpoint) if checkpoint.sees_images else None
    messages = with_keys(messages, album, checkpoint.path)
    row = encode_messages(checkpoint.tokenizer, spec, messages, album=album)
    return decode_rows(checkpoint, spec, options, [row], album=album)[0]


class Chat:
    """A conversation with a model: by its chat template or, if it has none, as one text that user
    and model continue in turn.

    Args:
        settings: options of `generate`.
        system: a system message; it needs a chat template.
        compare: write each answer in the AR mode too.

    Raises:
        Ar2DiffError: an option is wrong, or there is a system message and no template.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        settings: dict[str, Any],
        system: str | None = None,
        compare: bool = False,
    ):
        self.checkpoint, self.settings, self.system = checkpoint, dict(settings), system
        self.compare = compare
        self.templated = bool(checkpoint.tokenizer.chat_template)
        self.album = album_of(checkpoint) if checkpoint.sees_images else None
        self.attached: tuple[str, ...] = ()  # images of the next message
        self.exchanges: list[Exchange] = []
        self.dropped = 0  # oldest exchanges that the context has no room for
        self._stop = False
        if system is not None and not self.templated:
            raise Ar2DiffError(
                f"{option('system')} needs a chat template, but the tokenizer has none",
                f"leave out {option('system')}",
            )
        settings_of(checkpoint, self.settings)

    def greeting(self) -> list[Note]:
        """The first notes to show."""
        notes = [Note("/help lists the commands; Ctrl-C stops an answer, Ctrl-D quits")]
        if self.album is not None:
            notes.append(Note("/image FILE attaches an image to your next message"))
        if not self.templated:
            notes.insert(
                0,
                Note(
                    "the model has no chat template, so it continues your text (press Enter to let "
                    "it go on)"
                ),
            )
        return notes

    def stop(self) -> None:
        """Stop the current answer after its next forward; what has been decided is kept."""
        self._stop = True

    def events(self, line: str) -> Iterator[Event]:
        """The events that a line from the user leads to."""
        try:
            check_text(line, "the line")
            if line.startswith("/") and not line.startswith("//"):
                yield from self._command(line[1:])
            else:
                yield from self._answer(line.removeprefix("/") if line[:2] == "//" else line)
        except Ar2DiffError as error:
            error = error.named(as_setting)
            yield Problem(error.what, error.fix)

    # Answers

    def _answer(self, line: str) -> Iterator[Event]:
        if not line.strip() and (self.templated or not self.exchanges):
            yield Note("type a message, or /help")
            return
        spec, options = settings_of(self.checkpoint, self.settings)
        ids, new, notes = self._fit(line, spec, options)
        yield from notes

        def begun(asked: dict[str, Any]) -> Writing:
            asked = {**asked, "max_new_tokens": new}
            return Writing(
                self.checkpoint, *settings_of(self.checkpoint, asked), ids, None, self.album
            )

        compare = self.compare and options.mode != "ar"
        settings = self.settings
        writings = with_ar_beside(begun, settings) if compare else [begun(settings)]
        self._stop = False
        for _ in in_turn(writings):
            yield Step(tuple(writings))
            if self._stop:
                break
        answer = self._answered(*writings)
        if answer.result.new_tokens:
            said = Exchange(line, answer.result.text, answer.ended, self.attached)
            self.exchanges.append(said)
            self.attached = ()
        yield answer
        if answer.ended and not self.templated:
            yield Note("the model has finished its text; your next message starts a new one")

    def _answered(self, writing: Writing, beside: Writing | None = None) -> Answer:
        result = writing.result()
        return Answer(
            result=result,
            mode=writing.options.mode,
            stopped=not writing.done,
            ended=bool(result.token_ids) and result.token_ids[-1] in writing.canvas.ends,
            beside=beside.result() if beside else None,
        )

    def _fit(self, line: str, spec: Spec, options: Options) -> tuple[list[int], int, list[Note]]:
        """Ids to answer, the number of tokens there is room for, and remarks. The oldest exchanges
        are dropped until half of the context is left for an answer that asks for as much."""
        room, wanted = room_of(self.checkpoint.model, spec, options), options.max_new_tokens
        before = self.dropped
        ids = self._ids(line, spec)
        while room and len(ids) + min(wanted, room // 2) > room:
            if self.dropped == len(self.exchanges):
                break
            self.dropped += 1
            ids = self._ids(line, spec)
        notes = []
        if self.dropped > before:
            notes.append(
                Note(
                    f"the context of {room} tokens is full, so the {self.dropped - before} oldest "
                    "messages and answers were dropped"
                )
            )
        new = wanted if room is None else min(wanted, room - len(ids))
        if new < 1:
            raise Ar2DiffError(
                f"your message has {len(ids)} tokens, but the context only has room for {room}",
                "write a shorter message",
            )
        if new < wanted:
            notes.append(Note(f"the context has room for only {new} of {wanted} new tokens"))
        return ids, new, notes

    def _ids(self, line: str, spec: Spec) -> list[int]:
        checkpoint, asked = self.checkpoint, Exchange(line, "", False, self.attached)
        exchanges = self.exchanges[self.dropped :]
        if not self.templated:
            left = _left([*exchanges, asked])
            images = [image for exchange in left for image in exchange.images]
            return encode_prompt(checkpoint, spec, [_text(left)], images, self.album)
        messages = [*self._messages(exchanges), {"role": "user", "content": asked.content}]
        messages = with_keys(messages, self.album, checkpoint.path)
        return encode_messages(checkpoint.tokenizer, spec, messages, album=self.album)

    def _messages(self, exchanges: list[Exchange]) -> list[dict[str, Any]]:
        messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        for exchange in exchanges:
            messages.append({"role": "user", "content": exchange.content})
            messages.append({"role": "assistant", "content": exchange.answer})
        return messages

    # Commands

    def _command(self, line: str) -> Iterator[Event]:
        name, _, rest = line.strip().partition(" ")
        if name not in COMMANDS:
            known = [f"/{command}" for command in COMMANDS]
            raise Ar2DiffError(
                f"there is no command /{name}{nearest(f'/{MEANT.get(name, name)}', known)}",
                "type /help for a list, or // to start a message with /",
            )
        yield from getattr(self, f"_{name}")(rest.strip())

    def _help(self, _rest: str) -> Iterator[Event]:
        rows = [*COMMANDS.values(), GOES_ON]
        yield Note("\n".join(f"{usage:20} {text}" for usage, text in rows))

    def _image(self, rest: str) -> Iterator[Event]:
        if self.album is None:
            raise Ar2DiffError(
                "/image needs a vision-language model, and this one reads text alone",
                "describe the image in words",
            )
        if not rest:
            self.attached = ()
            yield Note("no image is attached")
            return
        key_of(self.album, rest, "/image")
        self.attached = (*self.attached, rest)
        count = len(self.attached)
        many = f"{count} images go" if count > 1 else f"{shortened(rest)} goes"
        yield Note(f"{many} with your next message")

    def _reset(self, _rest: str) -> Iterator[Event]:
        self.exchanges, self.dropped, self.attached = [], 0, ()
        yield Note("the conversation was forgotten")

    def _undo(self, _rest: str) -> Iterator[Event]:
        if not self.exchanges:
            raise Ar2DiffError("there is nothing to undo", "send a message first")
        exchange = self.exchanges.pop()
        self.dropped = min(self.dropped, len(self.exchanges))
        self.attached = exchange.images + self.attached
        again = "; its images go with your next message" if exchange.images else ""
        yield Note(f"forgot {shortened(exchange.said)} and its answer{again}")

    def _mode(self, rest: str) -> Iterator[Event]:
        yield from self._change({"mode": rest or None})

    def _compare(self, _rest: str) -> Iterator[Event]:
        if not self.compare:
            check_compare(*settings_of(self.checkpoint, self.settings))
        self.compare = not self.compare
        yield Note("answers are compared with the AR mode's" if self.compare else "no comparison")

    def _seed(self, rest: str) -> Iterator[Event]:
        yield from self._change({"seed": value_of("seed", rest)})

    def _set(self, rest: str) -> Iterator[Event]:
        yield from self._change(parse_settings(rest))

    def _change(self, values: dict[str, Any]) -> Iterator[Event]:
        merged = {**self.settings, **values}
        merged = {name: value for name, value in merged.items() if value is not None}
        settings_of(self.checkpoint, merged)
        self.settings = merged
        changes = (
            f"{as_setting(name, None)} is the default again"
            if value is None
            else f"{as_setting(name, None)} is now {value}"
            for name, value in values.items()
        )
        yield Note("; ".join(changes))

    def _show(self, _rest: str) -> Iterator[Event]:
        spec, options = settings_of(self.checkpoint, self.settings)
        lines = [f"{self.checkpoint.path}: {spec.attention} attention"]
        for name in SETTINGS:
            key = ALIASES.get(name, name)
            value = dict(options.filters).get(key) if key in FILTERS else getattr(options, key)
            shown = "not set" if value is None or value == () else value
            lines.append(f"{name:20} {shown}{'  (yours)' if key in self.settings else ''}")
        count = len(self.exchanges) - self.dropped
        room = room_of(self.checkpoint.model, spec, options)
        context = f"in a context of {room} tokens" if room else "in an unlimited context"
        lines.append(f"{'exchanges':20} {count} {context}")
        yield Note("\n".join(lines))

    def _save(self, rest: str) -> Iterator[Event]:
        if not rest:
            raise Ar2DiffError("/save needs a file name", "type /save chat.json, for example")
        try:
            path = Path(rest).expanduser()
            taken = path.exists()
        except (OSError, RuntimeError, ValueError) as error:  # too long a name, or no such user
            raise Ar2DiffError(
                f"/save {shortened(rest)}: this is not a file name ({first_line(error)})",
                "give another name",
            ) from None
        if taken:
            raise Ar2DiffError(f"{path} already exists", "choose another name")
        write_results(path, [{"messages": self._messages(self.exchanges)}])
        yield Note(f"wrote {path}")

    def _quit(self, _rest: str) -> Iterator[Event]:
        yield End()


def _left(exchanges: list[Exchange]) -> list[Exchange]:
    """The exchanges of the text that goes on: one that the model has ended is not continued."""
    ends = [n for n, exchange in enumerate(exchanges) if exchange.ended]
    return exchanges[ends[-1] + 1 if ends else 0 :]


def _text(exchanges: list[Exchange]) -> str:
    """The text that user and model write in turn."""
    text = ""
    for exchange in exchanges:
        said = IMAGE * len(exchange.images) + exchange.said
        apart = not text or not said or text[-1].isspace() or said[0].isspace()
        text += ("" if apart else " ") + said + exchange.answer
    return text
