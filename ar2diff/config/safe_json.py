"""Untrusted JSON, parsed within limits: no text can make the parser, or code that walks through the
values, fail in an unexpected way."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from functools import partial
from typing import Any

DEEPEST = 100  # levels of nesting; what real files need is below 20
LONGEST_INTEGER = 40  # digits; tokenizers write "no limit" as 10^30


def parse_json(
    text: str | bytes,
    *,
    longest_integer: int = LONGEST_INTEGER,
    constants: bool = True,
    twice: bool = True,
) -> Any:
    """The value of a JSON text.

    Args:
        text: bytes are read as UTF-8, the only encoding that JSON files may have.
        longest_integer: digits that an integer may have.
        constants: accept NaN and Infinity, which Python writes, and configs of some models contain;
            and numbers that are too large for a float.
        twice: accept objects that have a name twice; the last value counts.

    Raises:
        ValueError: it is not JSON, not UTF-8, nested deeper than `DEEPEST`, or contains an integer
            that is too long, what is not accepted, or half a surrogate pair. The message is one
            line, to follow "the file is not JSON: ".
    """
    if isinstance(text, bytes):
        if text.startswith(b"\xef\xbb\xbf"):
            raise ValueError("a byte order mark at the start")
        try:
            text = text.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"not UTF-8 (byte {error.start})") from None
    too_deep = ValueError(f"nested more than {DEEPEST} levels deep")
    try:
        value = json.loads(
            text,
            parse_int=partial(_integer, longest=longest_integer),
            parse_constant=None if constants else _constant,
            parse_float=None if constants else _float,
            object_pairs_hook=None if twice else _object,
        )
    except RecursionError:
        raise too_deep from None
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if "\n" in text.strip() else ""
        raise ValueError(f"{error.msg} at {line}column {error.colno}") from None
    if text.count("[") + text.count("{") > DEEPEST and _is_deep(value):
        raise too_deep
    if "\\ud" in text or "\\uD" in text:  # JSON itself allows half a surrogate pair
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("half a surrogate pair is not valid Unicode") from None
    return value


def _integer(digits: str, longest: int) -> int:
    if len(digits) > longest:
        raise ValueError(f"an integer of {len(digits)} digits")
    return int(digits)


def _float(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise ValueError("a number that is too large")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        double = next(name for name in found if names.count(name) > 1)
        raise ValueError(f"the name {double[:80]!r} stands twice in an object")
    return found


def _constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _is_deep(value: Any) -> bool:
    level: Iterable[Any] = [value]
    for _ in range(DEEPEST + 1):
        level = [
            item
            for v in level
            for item in (v.values() if isinstance(v, dict) else v if isinstance(v, list) else ())
        ]
        if not level:
            return False
    return True
