"""A schema's `pattern`, as a regular expression for the inside of a JSON text.

Python parses it, as `jsonschema` will. What is written matches whole texts and fewer of them: no
quote, backslash or control character; and where ECMAScript and Python differ about digits, words
and spaces, what both allow.
This file is copied into converted folders: it imports the standard library alone.
"""

from __future__ import annotations

import re
import warnings
from typing import Any

try:
    from re import _constants as code
    from re import _parser as parser
except ImportError:  # before Python 3.11
    import sre_constants as code  # type: ignore[no-redef]
    import sre_parse as parser  # type: ignore[no-redef]

QUOTED = r'"\\\x00-\x1f\x7f-\x9f'  # characters that stand for themselves in no JSON text
# What both languages take for digits, parts of words and spaces, and what either does.
BOTH = {"digit": "0-9", "word": "A-Za-z0-9_", "space": " "}
EITHER = {"digit": r"\d", "word": r"\w\p{L}\p{N}", "space": r"\s\x{FEFF}"}


def inside(pattern: str) -> str:
    """The expression for a pattern.

    Raises:
        ValueError: the pattern is not valid, or holds what cannot be written; it says what.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            tree = parser.parse(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"which is not valid ({error})") from None
    if tree.state.flags & ~re.UNICODE:
        raise ValueError("with flags")
    return _sequence(tree, True, True)


def _sequence(tree: Any, first: bool, last: bool) -> str:
    """The expression of nodes that follow one another.

    Args:
        first, last: whether the text begins before them, and ends behind them, so that anchors say
            nothing there.
    """
    nodes = [*tree]
    while first and nodes and nodes[0] == (code.AT, code.AT_BEGINNING):
        nodes.pop(0)
    while last and nodes and nodes[-1] == (code.AT, code.AT_END):
        nodes.pop()
    most = len(nodes) - 1
    return "".join(
        _node(kind, value, first and n == 0, last and n == most)
        for n, (kind, value) in enumerate(nodes)
    )


def _node(kind: Any, value: Any, first: bool, last: bool) -> str:
    if kind is code.LITERAL:
        return _letter(value)
    if kind is code.NOT_LITERAL:
        return f"[^{QUOTED}{_point(value)}]"
    if kind is code.ANY:
        return f"[^{QUOTED}]"
    if kind is code.IN:
        return _class(value)
    if kind is code.BRANCH:
        return f"(?:{'|'.join(_sequence(branch, first, last) for branch in value[1])})"
    if kind is code.SUBPATTERN and not value[1] and not value[2]:
        return f"(?:{_sequence(value[3], first, last)})"
    if kind in (code.MAX_REPEAT, code.MIN_REPEAT):
        low, high, body = value
        high = "" if high is code.MAXREPEAT else high
        return f"(?:{_sequence(body, False, False)}){{{low},{high}}}"
    name = value if kind is code.AT else "flags" if kind is code.SUBPATTERN else kind
    raise ValueError(f"with {str(name).lower()}")


def _letter(value: int) -> str:
    letter = chr(value)
    if letter in '"\\' or not letter.isprintable():
        raise ValueError(f"with {letter!r}")
    return letter if letter.isalnum() else _point(value)


def _point(value: int) -> str:
    """A character in an expression, where it may have a meaning of its own."""
    if 0xD800 <= value < 0xE000:
        raise ValueError(f"with {chr(value)!r}")
    return f"\\x{{{value:X}}}"


def _class(items: Any) -> str:
    """A set of characters: items are characters, ranges and named sets, the first perhaps a sign
    that the others are left out."""
    negated = items[0][0] is code.NEGATE
    found = [_item(kind, value, negated) for kind, value in items[negated:]]
    return f"[^{QUOTED}{''.join(found)}]" if negated else f"[[{''.join(found)}]--[{QUOTED}]]"


def _item(kind: Any, value: Any, negated: bool) -> str:
    if kind is code.LITERAL:
        return _point(value)
    if kind is code.RANGE:
        return f"{_point(value[0])}-{_point(value[1])}"
    name = str(value).lower().removeprefix("category_")
    other = name.startswith("not_")
    sets = EITHER if negated != other else BOTH
    own = sets[name.removeprefix("not_")]
    return f"[^{own}]" if other else own
