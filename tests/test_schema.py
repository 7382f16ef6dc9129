"""JSON schemas: what is not carried is refused by name; whatever else can be written validates."""

from __future__ import annotations

import json
import random
import tracemalloc

import pytest
from drawn_schemas import accepts, byte_automaton, generated, instances

from ar2diff.core import expression
from ar2diff.core.errors import Ar2DiffError
from ar2diff.core.options import Options
from ar2diff.core.pattern import pattern_of, validates
from ar2diff.core.schema import carried

WHOLE, TEXT = {"type": "integer"}, {"type": "string"}
OLD = {"$schema": "https://json-schema.org/draft/2019-09/schema"}
IGNORED = {  # what would not be held to, and what the refusal names
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
    "['a']": {"properties": {"a": WHOLE}, "required": [["a"]]},
    "1.5": {"type": "integer", "enum": [1.5]},
    "pattern": {"type": "string", "pattern": '"'},
    "http": {"$ref": "http://example.org/schema"},
    "'#place'": {"$ref": "#place"},
    "$id": {"anyOf": [{"$id": "http://example.org/schema"}]},
    "{'type'": {"type": ["string", {"type": "null"}]},
    "flags": {"type": "string", "pattern": "(?i)a"},
    "groupref": {"type": "string", "pattern": r"(a|b)\1"},
    "at_beginning": {"type": "string", "pattern": "a(^b|c)"},
    "at_end": {"type": "string", "pattern": "(a$|b)c"},
    "unbalanced": {"type": "string", "pattern": "a)|(b"},
    "minLength 1000": {"type": "string", "minLength": 10**30},
    "inf": {"const": [float("inf")]},
    "ud800": {"enum": ["\ud800"]},
    "minItems": {"type": "array", "minItems": 3, "maxItems": 2},
    "enum": {"enum": []},
    "back to itself": {
        "$ref": "#/$defs/a",
        "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}, {"type": "null"}]}},
    },
    "no value": {
        "$ref": "#/$defs/n",
        "$defs": {"n": {"properties": {"n": {"$ref": "#/$defs/n"}}, "required": ["n"]}},
    },
}


@pytest.mark.parametrize("named", IGNORED)
def test_what_is_not_carried_is_refused_by_name(named):
    for schema in (IGNORED[named], {"properties": {"deep": {"anyOf": [IGNORED[named], TEXT]}}}):
        if "$defs" in IGNORED[named] and "properties" in schema:
            continue  # its references are to places in the whole
        with pytest.raises(Ar2DiffError) as error:
            carried(schema)
        assert named in error.value.what


def test_a_misspelt_keyword_is_told_apart():
    with pytest.raises(Ar2DiffError, match="did you mean maxLength"):
        carried({"type": "string", "maxLenght": 3})
    with pytest.raises(Ar2DiffError) as error:
        carried(IGNORED["uniqueItems"])
    assert "did you mean" not in error.value.what


def test_a_keyword_that_the_dialect_ignores_is_refused():
    pair = {"prefixItems": [WHOLE, TEXT]}
    assert carried({"$schema": "https://json-schema.org/draft/2020-12/schema", **pair})
    with pytest.raises(Ar2DiffError, match="a dialect that ignores it"):
        carried({**OLD, **pair})
    with pytest.raises(Ar2DiffError, match=r"\$schema"):
        carried({"$schema": 3, **pair})


def deep(levels: int, around) -> dict:
    found: dict = TEXT
    for _ in range(levels):
        found = around(found)
    return found


EXPLODING = {
    "many optional properties": deep(
        3,
        lambda own: {
            "properties": dict.fromkeys("abcdef" * 3, own) | {f"p{n}": own for n in range(15)}
        },
    ),
    "lists of lists": deep(40, lambda own: {"type": "array", "items": own}),
    "one within another": deep(400, lambda own: {"anyOf": [own]}),
}


@pytest.mark.parametrize("name", EXPLODING)
def test_a_schema_that_explodes_is_refused_before_its_expression_is_written(name):
    pytest.importorskip("outlines_core")
    tracemalloc.start()
    with pytest.raises(Ar2DiffError, match=r"too deep|more than 5,000,000 characters"):
        pattern_of(Options(json_schema=json.dumps(EXPLODING[name])))
    assert tracemalloc.get_traced_memory()[1] < 100e6
    tracemalloc.stop()


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
    validator = pytest.importorskip("jsonschema").Draft202012Validator
    draw = random.Random(1)
    for schema in schemas:
        options = Options(json_schema=json.dumps(schema))
        for text in instances(pattern_of(options), 4, 30, draw):
            assert validates(options, text), f"{text} is not an instance of {schema}"
            check = validator(schema, format_checker=validator.FORMAT_CHECKER)
            assert check.is_valid(json.loads(text)), f"{text} has not the format of {schema}"


NUMBERS = [0.1 + 0.2, 5e-324, 1.7976931348623157e308, 2**64, -(10**40)]
NUMBERS += [random.Random(1).random() * 10.0**n for n in range(-20, 20)]
EXACT = [  # what outlines-core would write wrong
    *({"const": value} for value in NUMBERS),
    {"enum": [{"a.b": [{'"$"': 0.3}], "": None}, 'a"\\\n\x00\x7f', [[]], {}]},
    {"properties": {'a"\\': WHOLE, "(b.)*$": WHOLE}, "required": ['a"\\']},
    *({"type": "string", "format": name} for name in expression.FORMATS),
]
PATTERNS = [
    "^[ -~]+$", r"^[^\s]{9}$", r"^[^\d\w]{9}$", r"^\D\S\W$", "[[a]", "^[a&&b]+$", "[]a]x",
    "[a-z-9]{5}", r"[\[\]^-]+", "a{2,4}?b*?", "^a$|^b$", "^(a|^b)$", r"^\$\{#&[a-z]+~\}$",
    "^/[^/\"]*/$",
]  # fmt: skip


def test_values_names_formats_and_patterns_are_written_as_the_validator_reads_them():
    check_schemas([*EXACT, *({"type": "string", "pattern": pattern} for pattern in PATTERNS)])


def test_an_object_has_as_many_states_as_its_properties_need():
    pytest.importorskip("outlines_core")
    sizes = [
        byte_automaton(pattern_of(Options(json_schema=json.dumps({"properties": names})))).states
        for names in (dict.fromkeys(letters, TEXT) for letters in ("abcdef", "abc"))
    ]
    assert sizes[0] < 2.5 * sizes[1]


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        (
            {"format": "date"},
            "2024-02-29 2000-02-29 1999-12-31",
            "1900-02-29 2023-02-29 2024-06-31",
        ),
        ({"format": "time"}, "09:30:00Z 23:59:59.5+01:00", "09:30:00 24:00:00Z 9:30:00Z"),
        ({"format": "email"}, "a.b@c.de", 'a..b@c.de a@b @c.de "a"@c.de'),
        ({"format": "uri"}, "https://a.b:80/c?d=%20#e", 'https:// a.b https://a.b/"'),
        ({"pattern": "^a$|^b[0-2]{2}$"}, "a b02", "ab02 b0 b03"),
        ({"minLength": 2, "maxLength": 3}, r"ab a\n\\ ééé", r"a \n\n\n\n ab\x"),
    ],
)
def test_texts_are_accepted_and_refused(schema, good, bad):
    pytest.importorskip("outlines_core")
    own = byte_automaton(pattern_of(Options(json_schema=json.dumps({"type": "string", **schema}))))
    for texts, wanted in ((good, True), (bad, False)):
        for text in texts.split():
            assert accepts(own, f'"{text}"') is wanted, text


def test_a_text_may_go_on_behind_a_place_where_it_may_end():
    pytest.importorskip("outlines_core")
    own = byte_automaton("( a){1,3}")
    assert [accepts(own, " a" * n) for n in range(5)] == [False, True, True, True, False]
    number = byte_automaton(pattern_of(Options(json_schema='{"type": "number"}')))
    assert accepts(number, "1") and accepts(number, "-1.5e+30") and not accepts(number, "1.")


def test_every_text_of_a_schema_that_is_carried_validates():
    draw = random.Random(0)
    check_schemas([RECURSIVE, {}, {"type": "object"}, *(generated(draw) for _ in range(40))])


@pytest.mark.slow
def test_five_hundred_schemas():
    draw = random.Random(7)
    check_schemas([generated(draw) for _ in range(500)])


def test_a_schema_that_is_written_too_wide_is_caught_by_the_check(monkeypatch):
    """The check above can fail: without the walk, a bound is ignored and an instance too small."""
    monkeypatch.setattr("ar2diff.core.pattern.carried", lambda schema: schema)
    with pytest.raises(AssertionError, match="is not an instance"):
        check_schemas([{"type": "integer", "minimum": 10**9}])
