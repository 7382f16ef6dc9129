"""Which JSON schemas are carried, and what they come down to.

One keyword of a schema says what its values are like, and a few may stand beside it. Each schema is
walked, and whatever would not be held to is refused by name. What is carried may be narrower than
the schema, never wider: objects have only the properties that are named, in that order.
This file is copied into converted folders: it imports the standard library and its neighbours
alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

from .errors import Ar2DiffError, nearest, option, shortened
from .expression import FORMATS
from .inside import inside

DEPTH = 3  # times that a schema may stand within itself
PART = ""  # in place of a reference, where a walk goes on to a part of the value
MOST = 10_000  # schemas of a schema
LONGEST = 1_000_000  # of a text or a list that a schema may ask for
# Keywords that restrict nothing.
SILENT = {
    "$schema", "$id", "$comment", "title", "description", "default", "examples", "deprecated",
    "readOnly", "writeOnly",
}  # fmt: skip
PLACES = {"$defs", "definitions"}  # of schemas that others refer to
# Keywords that the standard has, or had, and that are not carried: none is a slip of the pen.
OTHERS = {
    "$anchor", "$dynamicRef", "$recursiveRef", "additionalItems", "contains", "dependencies",
    "dependentRequired", "dependentSchemas", "else", "exclusiveMaximum", "exclusiveMinimum", "if",
    "maxContains", "maximum", "maxProperties", "minContains", "minimum", "minProperties",
    "multipleOf", "not", "patternProperties", "propertyNames", "then", "unevaluatedItems",
    "unevaluatedProperties", "uniqueItems",
}  # fmt: skip
OLDER = re.compile(r"/draft-0[3467]/|/draft/2019-09/")  # dialects without prefixItems
# What decides, the first that a schema has, and what may stand beside it.
SHAPES = {
    "properties": {"type", "required", "additionalProperties"},
    "allOf": set(), "anyOf": set(), "oneOf": set(),
    "prefixItems": {"type", "items", "minItems", "maxItems"},
    "enum": {"type"}, "const": {"type"}, "$ref": set(),
}  # fmt: skip
TYPES = {
    "string": {"minLength", "maxLength", "pattern", "format"},
    "array": {"items", "minItems", "maxItems"},
    "object": {"additionalProperties"},
    "integer": set(), "number": set(), "boolean": set(), "null": set(),
}  # fmt: skip
# Where a schema says nothing, values are texts, numbers, true, false and null, or lists and objects
# of those: nested more deeply, an automaton would take a minute.
PLAIN = {"anyOf": [{"type": kind} for kind in ("string", "number", "boolean", "null")]}
ANYTHING = {"array": {"items": PLAIN}, "object": {"additionalProperties": PLAIN}}
ANY = {"anyOf": [PLAIN, *({"type": kind, **own} for kind, own in ANYTHING.items())]}


def carried(schema: Mapping[str, Any]) -> dict[str, Any]:
    """A schema as it is written: without what restricts nothing, and with what it refers
    to in its place, a schema within itself at most `DEPTH` times.

    Raises:
        Ar2DiffError: it has a keyword, or a combination of keywords, that is not carried; or no
            value so deep satisfies it.
    """
    dialect = schema.get("$schema", "")
    if not isinstance(dialect, str):
        raise _refused("#", f"$schema {shortened(dialect)}", "a text")
    found = _Walk(schema).of(schema, "#", ())
    if found is None:
        raise _refused("#", f"no value of at most {DEPTH} schemas within themselves", None)
    return found


class _Walk:
    """A walk through a schema and all that it refers to. What a method returns is a schema, or None
    if no value satisfies it."""

    def __init__(self, schema: Mapping[str, Any]):
        self.schema, self.seen = schema, 0

    def of(self, schema: Any, at: str, refs: tuple[str, ...]) -> dict[str, Any] | None:
        """A schema within the whole.

        Args:
            at: where it is. refs: the references that led there, and `PART` between those that
                are about a value and those that are about a part of it.
        """
        self.seen += 1
        if self.seen > MOST:
            raise _refused("#", f"more than {MOST:,} schemas once references are followed", None)
        if isinstance(schema, bool):
            return ANY if schema else None
        if not isinstance(schema, Mapping):
            raise _refused(at, f"{shortened(schema)} where a schema is expected", "an object")
        if "$id" in schema and schema is not self.schema:
            raise _refused(at, "'$id' within a schema", None)  # it changes what references mean
        known = {name: value for name, value in schema.items() if name not in SILENT | PLACES}
        shape = next((name for name in SHAPES if name in known), None)
        kinds = known.get("type", [])
        kinds = [kinds] if isinstance(kinds, str) else kinds
        if not isinstance(kinds, list) or any(kind not in [*TYPES] for kind in kinds):
            raise _refused(at, f"type {shortened(known['type'])}", "the types of JSON")
        if shape is None:
            beside = {"type"}.union(*(TYPES[kind] for kind in kinds))
        else:
            beside = {shape} | SHAPES[shape]
        for name in known:
            if name not in beside:
                self._refuse(name, shape, kinds, at)
        if shape is None:
            return self._typed(known, kinds, at, refs)
        return getattr(self, f"_{shape.removeprefix('$')}")(known, kinds, at, refs)

    def _refuse(self, name: str, shape: str | None, kinds: list[str], at: str) -> None:
        every = {
            *SHAPES,
            *(word for words in (*TYPES.values(), *SHAPES.values()) for word in words),
        }
        if name not in every:
            meant = "" if name in OTHERS else nearest(name, every)
            raise _refused(at, f"the keyword {name!r}{meant}", None)
        beside = repr(shape) if shape else f"type {shortened(kinds)}" if kinds else "no 'type'"
        raise _refused(at, f"{name!r} beside {beside}", None)

    def _typed(
        self, known: dict[str, Any], kinds: list[str], at: str, refs: tuple[str, ...]
    ) -> dict[str, Any] | None:
        if "type" in known and not kinds:
            raise _refused(at, "an empty list of types", "at least one")
        _check_bounds(known, at)
        found = []
        for kind in kinds:
            own = {**ANYTHING.get(kind, {}), **known}
            own = {name: value for name, value in own.items() if name in TYPES[kind]}
            if kind == "string":
                self._check_string(own, at)
            if "items" in own:
                own["items"] = self.of(own["items"], f"{at}/items", (*refs, PART))
                if own["items"] is None:
                    own = {"maxItems": 0} if not own.get("minItems") else None
            elif "additionalProperties" in own:
                values, there = own["additionalProperties"], f"{at}/additionalProperties"
                values = self.of(values, there, (*refs, PART))
                own = {"properties": {}} if values is None else {"additionalProperties": values}
            if own is not None:
                found.append({"type": kind, **own})
        return _one(found) if kinds else ANY

    def _check_string(self, found: dict[str, Any], at: str) -> None:
        lengths = [name for name in ("minLength", "maxLength") if name in found]
        shaping = [*[name for name in ("pattern", "format") if name in found], *lengths[:1]]
        if len(shaping) > 1:
            raise _refused(at, f"{shaping[1]!r} beside {shaping[0]!r}", None)
        if "pattern" in found:
            found["pattern"] = _pattern(found["pattern"], at)
        if "format" in found and found["format"] not in FORMATS:
            formats = f"one of {', '.join(FORMATS)}"
            raise _refused(at, f"format {shortened(found['format'])}", formats)

    def _properties(
        self, known: dict[str, Any], kinds: list[str], at: str, refs: tuple[str, ...]
    ) -> dict[str, Any] | None:
        names, required = known["properties"], known.get("required", [])
        if kinds and "object" not in kinds:
            raise _refused(at, f"'properties' beside type {shortened(kinds)}", None)
        if not isinstance(names, Mapping):
            raise _refused(at, "'properties' that are not an object", "an object")
        if not isinstance(required, list):
            raise _refused(at, f"'required' {shortened(required)}", "a list of names")
        for name in required:
            if not isinstance(name, str) or name not in names:
                raise _refused(
                    at, f"the required property {shortened(name)} without a schema", None
                )
        found = {}
        for name, schema in names.items():
            _check_value(name, at)
            found[name] = self.of(schema, f"{at}/properties/{name}", (*refs, PART))
        if any(found[name] is None for name in required):
            return None
        return {
            "type": "object",
            "properties": {n: own for n, own in found.items() if own is not None},
            "required": required,
        }

    def _several(
        self, name: str, known: dict[str, Any], at: str, refs: tuple[str, ...]
    ) -> list[dict[str, Any] | None]:
        schemas = known[name]
        if not isinstance(schemas, list) or not schemas:
            raise _refused(at, f"{name!r} without schemas", "a list of schemas")
        return [self.of(schema, f"{at}/{name}/{n}", refs) for n, schema in enumerate(schemas)]

    def _anyOf(
        self, known: dict[str, Any], _: list[str], at: str, refs: tuple[str, ...]
    ) -> dict[str, Any] | None:
        return _one([own for own in self._several("anyOf", known, at, refs) if own is not None])

    def _allOf(
        self, known: dict[str, Any], _: list[str], at: str, refs: tuple[str, ...]
    ) -> dict[str, Any] | None:
        schemas = self._several("allOf", known, at, refs)
        if len(schemas) > 1:
            raise _refused(at, "'allOf' of several schemas", "one schema that says it all")
        return schemas[0]

    def _oneOf(
        self, known: dict[str, Any], _: list[str], at: str, refs: tuple[str, ...]
    ) -> dict[str, Any] | None:
        schemas = [own for own in self._several("oneOf", known, at, refs) if own is not None]
        kinds = [_kinds(schema) for schema in schemas]
        if any(a & b for n, a in enumerate(kinds) for b in kinds[:n]):
            raise _refused(at, "'oneOf' of schemas that may overlap", "anyOf")
        return _one(schemas)

    def _prefixItems(
        self, known: dict[str, Any], kinds: list[str], at: str, refs: tuple[str, ...]
    ) -> dict[str, Any] | None:
        if OLDER.search(self.schema.get("$schema", "")):
            raise _refused(at, "'prefixItems' in a dialect that ignores it", "draft 2020-12")
        schemas = self._several("prefixItems", known, at, (*refs, PART))
        count = len(schemas)
        _check_bounds(known, at)
        if kinds and "array" not in kinds:
            raise _refused(at, f"'prefixItems' beside type {shortened(kinds)}", None)
        if not known.get("minItems", 0) <= count <= known.get("maxItems", count):
            raise _refused(at, "a number of items that is not that of 'prefixItems'", None)
        return None if None in schemas else {"type": "array", "prefixItems": schemas}

    def _enum(
        self, known: dict[str, Any], kinds: list[str], at: str, _: tuple[str, ...]
    ) -> dict[str, Any] | None:
        values = known["enum"]
        if not isinstance(values, list) or not values:
            raise _refused(at, "'enum' without values", "a list of values")
        self._check_values(values, kinds, at)
        return {"enum": values}

    def _const(
        self, known: dict[str, Any], kinds: list[str], at: str, _: tuple[str, ...]
    ) -> dict[str, Any] | None:
        self._check_values([known["const"]], kinds, at)
        return {"const": known["const"]}

    def _check_values(self, values: list[Any], kinds: list[str], at: str) -> None:
        for value in values:
            _check_value(value, at)
            kind = _kind(value)
            if kinds and kind not in kinds and not (kind == "integer" and "number" in kinds):
                raise _refused(at, f"the value {shortened(value)} beside type {kinds}", None)

    def _ref(
        self, known: dict[str, Any], _: list[str], at: str, refs: tuple[str, ...]
    ) -> dict[str, Any] | None:
        there = known["$ref"]
        if not isinstance(there, str) or not (there == "#" or there.startswith("#/")):
            raise _refused(at, f"the reference {shortened(there)}", "one within the schema (#/...)")
        if there in refs[_last(refs, PART) + 1 :]:
            raise _refused(at, f"the reference {shortened(there)} back to itself", None)
        if refs.count(there) >= DEPTH:
            return None
        found: Any = self.schema
        for part in there[1:].split("/")[1:]:
            part = unquote(part).replace("~1", "/").replace("~0", "~")
            if isinstance(found, list) and part.isdecimal() and int(part) < len(found):
                found = found[int(part)]
            elif isinstance(found, Mapping) and part in found:
                found = found[part]
            else:
                raise _refused(at, f"the reference {shortened(there)}", "one that exists")
            if isinstance(found, Mapping) and isinstance(found.get("$id"), str):
                raise _refused(at, f"{shortened(there)} across an '$id'", None)
        return self.of(found, there, (*refs, there))


def _last(values: tuple[str, ...], value: str) -> int:
    """The last place of a value; -1 without one."""
    return max((place for place, other in enumerate(values) if other == value), default=-1)


def _one(schemas: list[dict[str, Any]]) -> dict[str, Any] | None:
    """A schema of which any of several is enough."""
    return {"anyOf": schemas} if len(schemas) > 1 else schemas[0] if schemas else None


def _pattern(pattern: Any, at: str) -> str:
    if not isinstance(pattern, str):
        raise _refused(at, f"pattern {shortened(pattern)}", "a text")
    try:
        return inside(pattern)
    except ValueError as error:
        raise _refused(at, f"pattern {shortened(pattern)} {error}", None) from None


def _check_value(value: Any, at: str) -> None:
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except ValueError:
        raise _refused(at, f"{shortened(value)}, which JSON cannot write", None) from None


def _check_bounds(found: dict[str, Any], at: str) -> None:
    for least, most in (("minLength", "maxLength"), ("minItems", "maxItems")):
        low, high = found.get(least, 0), found.get(most)
        for name in (least, most):
            value = found.get(name, 0)
            whole = isinstance(value, int) and not isinstance(value, bool)
            if not whole or not 0 <= value <= LONGEST:
                wanted = f"an integer from 0 to {LONGEST:,}"
                raise _refused(at, f"{name} {shortened(value)}", wanted)
        if high is not None and low > high:
            raise _refused(at, f"{least} {low} above {most} {high}", None)


def _kind(value: Any) -> str:
    """The type of a JSON value."""
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, float) and value % 1:
        return "number"
    names = {int: "integer", float: "integer", str: "string", list: "array", dict: "object"}
    return names.get(type(value), "null")


def _kinds(schema: dict[str, Any]) -> set[str]:
    """The types of the values that a carried schema may have; `number` comes with `integer`."""
    if "anyOf" in schema:
        return set().union(*map(_kinds, schema["anyOf"]))
    if "enum" in schema or "const" in schema:
        found = {*map(_kind, schema.get("enum", [schema.get("const")]))}
    else:
        kinds = schema.get("type", [*TYPES])
        found = {kinds} if isinstance(kinds, str) else {*kinds}
    return found | ({"integer"} if "number" in found else set())


def _refused(at: str, what: str, wanted: str | None) -> Ar2DiffError:
    fix = f"use {wanted}" if wanted else "leave it out, or say it in another way"
    return Ar2DiffError(f"{option('json_schema')} has, at {at}, {what}, which is not carried", fix)
