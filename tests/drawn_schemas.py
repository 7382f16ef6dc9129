"""Schemas that are drawn, and texts that are drawn from an expression: for the tests and for
`benchmarks/schemas.py`."""

from __future__ import annotations

import random

import numpy as np

from ar2diff.core.automaton import Automaton
from ar2diff.core.index import _answer

WHOLE = {"type": "integer"}


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


def byte_automaton(pattern: str) -> Automaton:
    """The automaton of an expression over bytes; its end token is 256."""
    found = _answer(pattern, {bytes([byte]): [byte] for byte in range(256)}, 257)
    assert not isinstance(found, str), found
    start, final, edges = found
    return Automaton.of_edges(edges, [start], final, 257, end_ids=[256])


def accepts(own: Automaton, text: str) -> bool:
    """Whether an automaton over bytes accepts a text."""
    state = own.walk(text.encode(errors="surrogatepass"), own.starts[0])
    return state >= 0 and bool(own.accepting[state])


def instances(pattern: str, count: int, room: int, draw: random.Random) -> list[str]:
    """Texts that match an expression, by random walks over bytes that can still end in time."""
    own = byte_automaton(pattern)
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
