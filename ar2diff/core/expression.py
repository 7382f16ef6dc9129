"""The regular expression of the JSON texts of a schema that is carried.

outlines-core can write one too, but not one to rely on: it reads some numbers of an enum wrong in
the last digit, leaves the keys of its objects unescaped, and lets quotes into formats and patterns.
Objects have their properties in order, and one space may stand around brackets, colons and commas.
This file is copied into converted folders: it imports the standard library and its neighbours
alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from typing import Any

from .errors import Ar2DiffError, option

MOST = 5_000_000  # characters of an expression
SPECIAL = re.compile(r"[\\.+*?()|\[\]{}^$]")
SPACE, COMMA = " ?", " ?, ?"
CHARACTER = r'(?:[^"\\\x00-\x1f\x7f-\x9f]|\\["\\/bfnrt])'
INTEGER = "-?(?:0|[1-9][0-9]*)"
SCALARS = {
    "integer": INTEGER,
    "number": rf"{INTEGER}(?:\.[0-9]+)?(?:[eE][+-][0-9]+)?",
    "boolean": "(?:true|false)",
    "null": "null",
}
# The years from 1000 on, each month with its days; RFC 3339 wants an offset behind a time.
DATE = (
    "(?:[1-9][0-9]{3}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])"
    "|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)|02-(?:0[1-9]|1[0-9]|2[0-8]))"
    "|(?:[1-9][0-9](?:0[48]|[2468][048]|[13579][26])|(?:[2468][048]|[13579][26])00)-02-29)"
)
HOUR = "(?:[01][0-9]|2[0-3]):[0-5][0-9]"
TIME = rf"{HOUR}:[0-5][0-9](?:\.[0-9]{{1,9}})?(?:Z|[+-]{HOUR})"
LABEL, ATOM = "[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?", r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+"
PART = r"(?:[A-Za-z0-9._~!$&'()*+,;=:@/-]|%[0-9A-F]{2})*"
FORMATS = {
    "date": DATE,
    "date-time": f"{DATE}T{TIME}",
    "time": TIME,
    "uuid": "[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}",
    "uri": (
        rf"(?:https?|ftp)://{LABEL}(?:\.{LABEL})*(?::[0-9]{{1,5}})?"
        rf"(?:/{PART})?(?:\?{PART})?(?:#{PART})?"
    ),
    "email": rf"{ATOM}(?:\.{ATOM})*@(?:{LABEL}\.)+{LABEL}",
}


def escaped(text: str) -> str:
    """An expression for a text itself."""
    return SPECIAL.sub(r"\\\g<0>", text)


def expression_of(schema: dict[str, Any]) -> str:
    """The expression of a schema as `carried` returns it.

    Raises:
        Ar2DiffError: it would have more than `MOST` characters.
    """
    if "anyOf" in schema:
        found = _any(map(expression_of, schema["anyOf"]))
    elif "enum" in schema:
        found = _any(map(_literal, schema["enum"]))
    elif "const" in schema:
        found = _literal(schema["const"])
    elif schema["type"] in SCALARS:
        found = SCALARS[schema["type"]]
    else:
        kinds = {"string": _string, "array": _array, "object": _object}
        found = kinds[schema["type"]](schema)
    _check_size(len(found))
    return found


def _any(expressions: Any) -> str:
    return f"(?:{'|'.join(expressions)})"


def _check_size(characters: int) -> None:
    if characters > MOST:
        raise Ar2DiffError(
            f"{option('json_schema')} makes a regular expression of more than {MOST:,} characters",
            "use a schema with fewer optional properties, or with less nesting",
        )


def _literal(value: Any) -> str:
    """The expression of one value."""
    if isinstance(value, dict):
        pairs = [f"{_key(name)}{_literal(own)}" for name, own in value.items()]
        return _between(r"\{", COMMA.join(pairs), r"\}")
    if isinstance(value, list):
        return _between(r"\[", COMMA.join(map(_literal, value)), r"\]")
    return escaped(json.dumps(value, ensure_ascii=False))


def _key(name: str) -> str:
    """The expression of a property's name, up to its value."""
    return f"{_literal(name)}{SPACE}:{SPACE}"


def _between(opening: str, body: str, closing: str, optional: bool = False) -> str:
    """Brackets around a body, which may be empty."""
    body = f"{body}{SPACE}" if body else ""
    return f"{opening}{SPACE}{f'(?:{body})?' if optional and body else body}{closing}"


def _string(schema: dict[str, Any]) -> str:
    low, high = schema.get("minLength", 0), schema.get("maxLength", "")
    shaped = schema.get("pattern") or FORMATS.get(schema.get("format", ""))
    return f'"{f"(?:{shaped})" if shaped else f"{CHARACTER}{{{low},{high}}}"}"'


def _array(schema: dict[str, Any]) -> str:
    if "prefixItems" in schema:
        body = COMMA.join(map(expression_of, schema["prefixItems"]))
        return _between(r"\[", body, r"\]")
    low, high = schema.get("minItems", 0), schema.get("maxItems")
    if high == 0:
        return _between(r"\[", "", r"\]")
    item = expression_of(schema["items"])
    more = f"{{{max(low - 1, 0)},{'' if high is None else high - 1}}}"
    return _between(r"\[", f"{item}(?:{COMMA}{item}){more}", r"\]", optional=low == 0)


def _object(schema: dict[str, Any]) -> str:
    if "properties" not in schema:
        pair = f'"{CHARACTER}*"{SPACE}:{SPACE}{expression_of(schema["additionalProperties"])}'
        return _between(r"\{", f"{pair}(?:{COMMA}{pair})*", r"\}", optional=True)
    required = {*schema["required"]} if "required" in schema else set()
    pairs = {name: _key(name) + expression_of(own) for name, own in schema["properties"].items()}
    if required:
        return _between(r"\{", _with_required(pairs, required), r"\}")
    _check_size(len(pairs) * sum(map(len, pairs.values())))
    before, ways = "", []
    for pair in pairs.values():  # by the last that is there: what may stand before it is shared
        ways.append(before + pair)
        before += f"(?:{pair}{COMMA})?"
    return _between(r"\{", _any(ways) if ways else "", r"\}", optional=True)


def _with_required(pairs: dict[str, str], required: Collection[str]) -> str:
    """The properties of an object that has some for certain: those before the last of these have a
    comma behind them, those after it one before them."""
    last: int = max(n for n, name in enumerate(pairs) if name in required)
    found: Sequence[str] = [
        f"{pair}{COMMA}" if n < last else f"{COMMA}{pair}" if n > last else pair
        for n, pair in enumerate(pairs.values())
    ]
    return "".join(
        own if name in required else f"(?:{own})?" for name, own in zip(pairs, found, strict=True)
    )
