"""JSON schemas: what is not carried is refused by name; whatever else can be written validates."""

from __future__ import annotations

import json
import random

import pytest

from ar2diff.core.errors import Ar2DiffError
from ar2diff.core.options import Options
from ar2diff.core.pattern import pattern_of, validates
from ar2diff.core.schema import carried

WHOLE, TEXT = {"type": "integer"}, {"type": "string"}
IGNORED = {  # what outlines-core ignores, or gets wrong, and what the refusal names
    "minimum": {"type": "integer", "minimum": 3},
    "exclusiveMaximum": {"type": "number", "exclusiveMaximum": 3},
    "multipleOf": {"type": "integer", "multipleOf": 5},
    "minProperties": {"type": "object", "additionalProperties": WHOLE, "minProperties": 2},
    "patternProperties": {"type": "object", "patternProperties": {"^x": WHOLE}},
    "propertyNames": {"type": "object", "propertyNames": {"maxLength": 2}},
    "uniqueItems": {"type": "array", "items": WHOLE, "uniqueItems": True},
    "contains": {"type": "array", "contains": WHOLE},
    "not": {"not": WHOLE},
    "if": {"properties": {"a": WHOLE}, "if": {"required": ["a"]}},
    "dependentRequired": {"properties": {"a": WHOLE}, "dependentRequired": {"a": ["b"]}},
    "unevaluatedProperties": {"properties": {"a": WHOLE}, "unevaluatedProperties": False},
    "allOf": {"allOf": [{"properties": {"a": WHOLE}}, {"properties": {"b": WHOLE}}]},
    "oneOf": {"oneOf": [WHOLE, {"type": "number"}]},
    "anyOf": {"type": "object", "properties": {"a": WHOLE}, "anyOf": [{"required": ["a"]}]},
    "minLength": {"type": "string", "minLength": 2, "pattern": "a"},
    "format": {"type": "string", "format": "ipv4"},
    "'b'": {"properties": {"a": WHOLE}, "required": ["b"]},
    "1.5": {"type": "integer", "enum": [1.5]},
    "pattern": {"type": "string", "pattern": '"'},
    "http": {"$ref": "http://example.org/schema"},
    "minItems": {"type": "array", "minItems": 3, "maxItems": 2},
    "enum": {"enum": []},
    "no value": {
        "$ref": "#/$defs/n",
        "$defs": {"n": {"properties": {"n": {"$ref": "#/$defs/n"}}, "required": ["n"]}},
    },
}


@pytest.mark.parametrize("named", IGNORED)
def test_what_is_not_carried_is_refused_by_name(named):
    for schema in (IGNORED[named], {"properties": {"deep": {"anyOf": [IGNORED[named], TEXT]}}}):
        if named == "no value" and "properties" in schema:
            continue  # there the other alternative is left
        with pytest.raises(Ar2DiffError) as error:
            carried(schema)
        assert named in error.value.what


def test_a_misspelt_keyword_is_told_apart():
    with pytest.raises(Ar2DiffError, match="did you mean maxLength"):
        carried({"type": "string", "maxLenght": 3})


def generated(draw: random.Random, depth: int = 3) -> dict:
    """A schema of what is carried, with titles and defaults strewn in."""
    kinds = ["string", "integer", "number", "boolean", "null", "enum", "const", "pattern", "list"]
    kinds += ["object", "array", "tuple", "anyOf", "oneOf", "map", "allOf"] if depth else []
    kind = draw.choice(kinds)
    more = {"title": "minimum", "default": 3} if draw.random() < 0.3 else {}
    values = ["a", 'b"\\', "é", 1, -2.5, True, None, {"a": [1, {}]}, [], 1e30]
    match kind:
        case "string":
            low = draw.randrange(3)
            made = {"type": kind, "minLength": low, "maxLength": low + draw.randrange(4)}
        case "pattern":
            patterns = ["^[a-c]+$", "x|y", r"^\d{2}-\w", ".b", "[^a]", r"^\s\.\/$", "(ab)?c", "a$"]
            made = {"type": "string", "pattern": draw.choice(patterns)}
        case "enum":
            made = {"enum": draw.sample(values, 3)}
        case "const":
            made = {"const": draw.choice(values)}
        case "list":
            made = {
                "type": draw.sample(["integer", "null", "string", "boolean"], 2),
                "maxLength": 3,
            }
            if "string" not in made["type"]:
                del made["maxLength"]
        case "object":
            names = draw.sample("abcde", draw.randrange(4))
            made = {"type": kind, "properties": {n: generated(draw, depth - 1) for n in names}}
            made["required"] = [name for name in names if draw.random() < 0.5]
            made |= {"additionalProperties": False} if draw.random() < 0.5 else {}
        case "array":
            low = draw.randrange(2)
            made = {"type": kind, "items": generated(draw, depth - 1), "minItems": low}
            made |= {"maxItems": low + draw.randrange(3)} if draw.random() < 0.7 else {}
        case "tuple":
            made = {"prefixItems": [generated(draw, depth - 1) for _ in range(2)], "items": False}
        case "map":
            made = {"type": "object", "additionalProperties": generated(draw, depth - 1)}
        case "anyOf" | "allOf":
            count = 2 if kind == "anyOf" else 1
            made = {kind: [generated(draw, depth - 1) for _ in range(count)]}
        case "oneOf":
            made = {"oneOf": [WHOLE, {"type": "string", "maxLength": 2}, {"type": "null"}]}
        case _:
            made = {"type": kind}
    return {**more, **made}


def instances(pattern: str, count: int, room: int, draw: random.Random) -> list[str]:
    """Texts that match an expression, by random walks over bytes that can still end in time."""
    import numpy as np

    from ar2diff.core.automaton import Automaton
    from ar2diff.core.index import _answer

    found = _answer(pattern, {bytes([byte]): [byte] for byte in range(256)}, 257)
    assert not isinstance(found, str), found
    start, final, edges = found
    own = Automaton.of_edges(edges, [start], final, 257, end_ids=[256])
    shortest = own.shortest(own.starts[0])
    left = own.completable(shortest + room, 0)
    members = [np.flatnonzero(own.token_class.numpy() == label) for label in range(own.classes)]
    texts = []
    for _ in range(count):
        state, text = own.starts[0], bytearray()
        for n in range(shortest + room, 0, -1):
            edges = slice(own.first[state], own.first[state + 1])
            fits = np.flatnonzero(left[n - 1][own.target[edges]]) + own.first[state]
            edge = draw.choice(fits.tolist())
            if own.label[edge] == own.ends:
                break
            text.append(draw.choice(members[own.label[edge]].tolist()))
            state = own.target[edge]
        texts.append(text.decode())
    return texts


RECURSIVE = {
    "$defs": {
        "n": {
            "type": "object",
            "properties": {"v": WHOLE, "k": {"type": "array", "items": {"$ref": "#/$defs/n"}}},
            "required": ["v", "k"],
        },
        "t": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/u"}]},
        "u": {"properties": {"next": {"$ref": "#/$defs/t"}}, "required": ["next"]},
    },
    "prefixItems": [{"$ref": "#/$defs/n"}, {"$ref": "#/$defs/t"}],
}


def check_schemas(schemas: list[dict]) -> None:
    pytest.importorskip("outlines_core")
    draw = random.Random(1)
    for schema in schemas:
        options = Options(json_schema=json.dumps(schema))
        for text in instances(pattern_of(options), 4, 30, draw):
            assert validates(options, text), f"{text} is not an instance of {schema}"


def test_every_text_of_a_schema_that_is_carried_validates():
    draw = random.Random(0)
    check_schemas([RECURSIVE, {}, {"type": "object"}, *(generated(draw) for _ in range(40))])


@pytest.mark.slow
def test_five_hundred_schemas():
    draw = random.Random(7)
    check_schemas([generated(draw) for _ in range(500)])


def test_a_schema_that_outlines_core_would_widen_is_caught_by_the_check(monkeypatch):
    """The check above can fail: without the walk, a bound is ignored and an instance too small."""
    monkeypatch.setattr("ar2diff.core.pattern.carried", lambda schema: schema)
    with pytest.raises(AssertionError, match="is not an instance"):
        check_schemas([{"type": "integer", "minimum": 10**9}])
