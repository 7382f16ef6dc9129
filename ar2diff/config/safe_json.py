"""Untrusted JSON, parsed within limits: no text can make the parser, or code that walks through the
values, fail in an unexpected way."""

from __future__ import annotations

import json
from typing import Any

DEEPEST = 100  # levels of nesting; what real files need is below 20
LONGEST_INTEGER = 40  # digits; tokenizers write "no limit" as 10^30


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text.

    Args:
        text: bytes are read as UTF-8, the only encoding that JSON files may have.

    Raises:
        ValueError: it is not JSON, not UTF-8, nested deeper than `DEEPEST`, or holds an integer of
            more than `LONGEST_INTEGER` digits or a text that is not valid Unicode. The message is
            one line, to follow "the file is not usable JSON".
    """
    if isinstance(text, bytes):
        if text.startswith(b"\xef\xbb\xbf"):
            raise ValueError("it begins with a byte order mark")
        try:
            text = text.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"it is not UTF-8 (byte {error.start})") from None
    try:
        value = json.loads(text, parse_int=_integer)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise ValueError(f"{error.msg} at {place}") from None
    _check(value)
    return value


def _integer(digits: str) -> int:
    if len(digits) > LONGEST_INTEGER:
        raise ValueError(f"it contains an integer with {len(digits)} digits")
    return int(digits)


def _check(value: Any) -> None:
    level, depth = [value], 0
    while level:
        if depth > DEEPEST:
            raise ValueError("it is nested too deeply")
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                below += [*item, *item.values()]
            elif isinstance(item, list):
                below += item
            elif isinstance(item, str) and not item.isascii():
                try:
                    item.encode()
                except UnicodeEncodeError:
                    raise ValueError("it contains a text that is not valid Unicode") from None
        level, depth = below, depth + 1
