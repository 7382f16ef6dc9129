"""Calls of tools, in the layout that a model's own chat template gives them.

The layout is found by rendering a conversation in which a function is called: what stands around
its name and arguments is how this model writes a call, and how its calls are read.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..core.expression import escaped, expression_of
from ..core.schema import carried

NAMES = ("ar2diff_first", "ar2diff_second")
KEYS = ("ar2diff_key", "ar2diff_word")
IDS = ("ar2diffQ1", "ar2diffQ2")  # nine letters and digits, as some templates want them
CONTENT = "ar2diff_answer"
ID_PATTERN = "[A-Za-z0-9]{9}"
PUNCTUATION = set("{}[]:,")
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "A function.",
            "parameters": {"type": "object", "properties": {key: {"type": "string"}}},
        },
    }
    for name, key in zip(NAMES, KEYS, strict=True)
]
USER = {"role": "user", "content": "ar2diff_question"}


@dataclass(frozen=True)
class Call:
    """A function that is called.

    Attributes:
        arguments: as the text of a JSON object.
    """

    name: str
    arguments: str

    def as_json(self, index: int | None = None) -> dict[str, Any]:
        """As clients get it."""
        place = {} if index is None else {"index": index}
        function = {"name": self.name, "arguments": self.arguments}
        return {
            **place, "id": f"call_{uuid.uuid4().hex[:24]}", "type": "function",
            "function": function,
        }  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """How calls are written: head, name, middle, arguments, tail; where an answer may have several,
    `join` stands between the arguments of one and the name of the next. An id is None within a
    text's parts.

    Attributes:
        lead: what the template puts before any answer.
        special: names of the special tokens, which the text of an answer lacks.
        as_text: the template wants arguments as a text, not as an object.
    """

    lead: str
    head: str
    middle: str
    join: str | None
    tail: str
    special: tuple[str, ...] = ()
    as_text: bool = False

    def opening(self) -> tuple[str, str]:
        """What a prompt has to end with so that a call is begun, and what is left of the head."""
        place = max((self.head.rfind(name) + len(name) for name in self.special
                     if name in self.head), default=0)  # fmt: skip
        return self.lead + self.head[:place], self.head[place:]

    def shown(self) -> str:
        """What of the opening stands in the text that calls are read from."""
        opening = self.opening()[0].removeprefix(self.lead)
        return _visible(opening, self.special)

    def closing(self) -> str:
        """The tail, up to a special token."""
        places = [self.tail.find(name) for name in self.special if name in self.tail]
        return self.tail[: min(places, default=len(self.tail))].rstrip()

    def pattern(self, tools: Sequence[Mapping[str, Any]]) -> str:
        """The regular expression of a call, from the end of the opening on.

        Args:
            tools: descriptions of the functions that may be called.

        Raises:
            Ar2DiffError: the parameters of one have a schema that is not carried.
        """
        start = self.opening()[1]
        calls = (f"{escaped(tool['name'] + self.middle)}{_arguments(tool)}" for tool in tools)
        return f"{_escaped(start)}(?:{'|'.join(calls)}){_escaped(self.closing())}"

    def calls(self, text: str, names: Sequence[str]) -> tuple[str, list[Call]]:
        """The calls in a text, and what stands before them; none if they cannot be read.

        Args:
            names: of the functions that there are.
        """
        found = self._expression(self.head).search(text)
        place, calls = (found.end(), []) if found else (None, [])
        while place is not None:
            read = self._read(text, place, names)
            if read is None:
                break
            call, place = read
            calls.append(call)
            more = self._expression(self.join).match(text, place) if self.join else None
            place = more.end() if more else None
        if found is None or not calls:
            return text, []
        return text[: found.start()].rstrip(), calls

    def begins(self, text: str) -> int:
        """Where a call begins in a text, or may begin at its end; its length if nowhere."""
        found = self._expression(self.head).search(text)
        if found:
            return len(text[: found.start()].rstrip())
        head = "".join(_visible(self.head, self.special).split())
        places = [place for place, letter in enumerate(text) if not letter.isspace()]
        letters = "".join(text[place] for place in places[-len(head) :])
        for size in range(min(len(head) - 1, len(letters)), 0, -1):
            if letters.endswith(head[:size]):
                return len(text[: places[-size]].rstrip())
        return len(text.rstrip())

    def _read(self, text: str, place: int, names: Sequence[str]) -> tuple[Call, int] | None:
        """A call whose name begins at a place of a text, and the end of its arguments."""
        for name in sorted(names, key=len, reverse=True):
            if not text.startswith(name, place):
                continue
            middle = self._expression(self.middle).match(text, place + len(name))
            if middle is None:
                continue
            try:
                value, end = json.JSONDecoder().raw_decode(text, middle.end())
            except (ValueError, RecursionError):
                continue
            if isinstance(value, dict):
                return Call(name, text[middle.end() : end]), end
        return None

    def _expression(self, part: str) -> re.Pattern[str]:
        """An expression for a part as models write it, who are free with spaces."""
        found = ""
        for word in re.findall(r"\s+|\w+|.", _visible(part, self.special).strip()):
            if word.isspace():
                found += r"\s*"
            elif word in PUNCTUATION:
                found += rf"\s*{re.escape(word)}\s*"
            else:
                found += re.escape(word)
        for own in IDS:
            found = found.replace(own, ID_PATTERN)
        return re.compile(found)


def _visible(part: str, special: Sequence[str]) -> str:
    for name in special:
        part = part.replace(name, "")
    return part


def _escaped(part: str) -> str:
    found = escaped(part)
    for own in IDS:
        found = found.replace(own, ID_PATTERN)
    return found


def _arguments(tool: Mapping[str, Any]) -> str:
    schema = tool.get("parameters") or {"type": "object", "properties": {}}
    return expression_of(carried(schema))


def layout_of(tokenizer: Any) -> Layout | None:
    """The layout that a tokenizer's chat template gives to calls; None if it renders no tools, or
    not as JSON."""
    if not tokenizer.chat_template:
        return None
    for as_text in (False, True):
        try:
            found = _layout(tokenizer, as_text)
        except Exception:  # a template may raise anything
            continue
        if found is not None:
            return found
    return None


def _layout(tokenizer: Any, as_text: bool) -> Layout | None:
    def render(*messages: Any, tools: Any = TOOLS, begun: bool = False) -> str:
        return tokenizer.apply_chat_template(
            [USER, *messages], tools=tools, tokenize=False, add_generation_prompt=begun
        )

    prompt = render(begun=True)
    if prompt == render(tools=None, begun=True):
        return None  # the model would never hear of them
    plain, one = render({"role": "assistant", "content": CONTENT}), render(_call(1, as_text))
    if not (plain.startswith(prompt) and one.startswith(prompt)):
        return None
    lead, closing = plain[len(prompt) :].split(CONTENT)
    head, middle, tail = _parts(one[len(prompt) :])
    if lead and head.startswith(lead):
        head = head[len(lead) :]
    else:
        lead = ""
    if closing and tail.endswith(closing):
        tail = tail[: -len(closing)]
    try:
        both = render(_call(2, as_text))
        join = _parts(both.removeprefix(prompt))[2].split(NAMES[1])[0]
    except Exception:  # one call in an answer is all that it takes
        join = None
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    special = {*tokenizer.all_special_tokens, *(str(token) for token in added if token.special)}
    names = tuple(sorted(special, key=len, reverse=True))
    return Layout(lead, head, middle, join, tail, names, as_text)


def _call(count: int, as_text: bool) -> dict[str, Any]:
    calls = []
    for name, key, own in [*zip(NAMES, KEYS, IDS, strict=True)][:count]:
        arguments: Any = {key: "x"}
        arguments = json.dumps(arguments) if as_text else arguments
        function = {"name": name, "arguments": arguments}
        calls.append({"id": own, "type": "function", "function": function})
    return {"role": "assistant", "content": "", "tool_calls": calls}


def _parts(text: str) -> tuple[str, str, str]:
    """What stands before the name of the first call, between it and the arguments, and behind.

    Raises:
        ValueError: the arguments are not there as JSON, behind the name.
    """
    place = text.index(NAMES[0])
    after = place + len(NAMES[0])
    key = text.index(f'"{KEYS[0]}"', after)
    begin = text.rindex("{", after, key)
    value, end = json.JSONDecoder().raw_decode(text, begin)
    if value != {KEYS[0]: "x"}:
        raise ValueError
    return text[:place], text[after:begin], text[end:]
