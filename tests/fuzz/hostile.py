"""Values that nobody expects, for every place that takes one: JSON, YAML, templates, arguments."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from typing import Any

# json.dumps refuses these itself; the marks are replaced in its text.
RAW = {
    "@@digits@@": "9" * 5000,
    "@@deep@@": "[" * 20_000 + "]" * 20_000,
    "@@deep object@@": '{"a":' * 20_000 + "1" + "}" * 20_000,
    "@@huge float@@": "1e999",
    "@@lone surrogate@@": '"\\ud800"',
    "@@not a number@@": "NaN",
}
NUMBERS: list[Any] = [
    0,
    1,
    -1,
    2,
    7,
    0.5,
    -0.0,
    1e308,
    10**6,
    10**9,
    2**31,
    2**63,
    -(2**63),
    10**30,
]
TEXTS = [
    "", " ", "x", "true", "null", "\x00", "\ud800", "x" * 5000, "../../secret", "/dev/zero", "/",
    "{mask:3}", "<|mask|>", "🦙" * 40, "a\nb\nc", "%s%n{}", "../secret.safetensors", "2020-13-45",
]  # fmt: skip
TREES: list[Any] = [[], {}, [[]], {"a": 1}, [None], ["a"], [1, 2], {"": {}}, [{}], {"a": {"a": {}}}]

TEMPLATES = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% for k in range(99999) %}x"
    "{% endfor %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% if i == j == 5 %}{% endif %}"
    "{% endfor %}{% endfor %}",
    "{% macro a(n) %}{% if n %}{{ a(n - 1) }}{{ a(n - 1) }}{% endif %}{% endmacro %}{{ a(60) }}",
    "{% for m in messages %}{{ m.content }}{% endfor %}{% for i in range(99999) %}"
    "{% for j in range(99999) | sort %}{% endfor %}{% endfor %}",
    "{% set ns = namespace(n=7) %}{% for i in range(99) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
    "{{ 'x' * 10**10 }}",
    "{{ 9 ** 9 ** 9 }}",
    "{{ range(10**12) | list }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ ('x' * 100000) | center(1000000000) }}",
    "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
    "{% set ns = namespace(s='ab') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}"
    "{% endfor %}{{ ns.s }}",
    "{{ raise_exception('no such role') }}",
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
    "{% endif %}{{ m.content }}{% endfor %}",
    "{% for m in messages %}",
    "{{ messages[0]['content'] | nofilter }}",
    "{{ messages[99].content.x.y }}",
    "{{ 1 / 0 }}",
    "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('touch pwned') }}",
    "{{ lipsum(n=100000) }}",
    "{% include 'config.json' %}",
    "{{ strftime_now('%Y' * 100000) }}",
    "{% generation %}{% generation %}x{% endgeneration %}{% endgeneration %}",
    "{{ messages | tojson }}",
    "{{ bos_token + messages[0]['content'] + None }}",
    "(" * 2000,
    "{{ " + "(" * 500 + "1" + ")" * 500 + " }}",
    "{{ " + "-" * 20_000 + "1 }}",
    "",
    "constant",
    "{% for m in messages %}{{ m.content }}{% endfor %}\ud800",
    "{{ '(a+)+$' | string * 1000 }}",
]


def value(draw: random.Random, old: Any = None) -> Any:
    """A hostile value of JSON, perhaps made of the one that is there."""
    kinds = [
        lambda: draw.choice([None, True, False]),
        lambda: draw.choice(NUMBERS),
        lambda: draw.choice(TEXTS),
        lambda: draw.choice(TREES),
        lambda: draw.choice(sorted(RAW)),
        lambda: [old],
        lambda: {"a": old},
        lambda: str(old)[:5000],
        lambda: -old if isinstance(old, int | float) and not isinstance(old, bool) else [old] * 3,
    ]
    return draw.choice(kinds)()


def places(tree: Any, path: tuple = ()) -> Iterator[tuple]:
    """The paths of all values below a tree."""
    items = (
        tree.items()
        if isinstance(tree, dict)
        else enumerate(tree)
        if isinstance(tree, list)
        else ()
    )
    for name, item in items:
        yield (*path, name)
        yield from places(item, (*path, name))


def at(tree: Any, path: tuple) -> Any:
    """The value at a path."""
    for name in path:
        tree = tree[name]
    return tree


def mutate_tree(draw: random.Random, tree: Any) -> tuple[Any, str]:
    """A tree of JSON with one place changed, removed or added, and what was done."""
    found = list(places(tree))
    if not found or draw.random() < 0.03:
        new = value(draw, tree)
        return new, f"all = {shown(new)}"
    depth = draw.choice(sorted({len(path) for path in found}))
    path = draw.choice([p for p in found if len(p) == depth])
    parent, name = at(tree, path[:-1]), path[-1]
    told = ".".join(map(str, path))[:100]
    if draw.random() < 0.15:
        del parent[name]
        return tree, f"{told} removed"
    parent[name] = value(draw, parent[name])
    return tree, f"{told} = {shown(parent[name])}"


def shown(item: Any) -> str:
    """A value, short."""
    text = ascii(item)
    return text if len(text) < 60 else f"{text[:50]}... ({len(text)} characters)"


def dumps(tree: Any) -> bytes:
    """JSON, with the marks replaced by what no library would write."""
    text = json.dumps(tree, ensure_ascii=True)
    for mark, raw in RAW.items():
        text = text.replace(json.dumps(mark), raw)
    return text.encode()


def mutate_bytes(draw: random.Random, data: bytes) -> tuple[bytes, str]:
    """Bytes with a fault that a disk, a download or an editor makes."""
    place = draw.randrange(len(data)) if data else 0
    kind = draw.choice(
        ["empty", "cut", "bom", "bytes", "zeros", "utf-16", "twice", "deep", "digits"]
    )
    match kind:
        case "empty":
            return b"", kind
        case "cut":
            return data[:place], f"cut at {place}"
        case "bom":
            return b"\xef\xbb\xbf" + data, kind
        case "bytes":
            return data[:place] + b"\xff\xfe\x80" + data[place + 3 :], f"bytes at {place}"
        case "zeros":
            return data[:place] + bytes(8) + data[place + 8 :], f"zeros at {place}"
        case "utf-16":
            return data.decode("utf-8", "replace").encode("utf-16"), kind
        case "twice":
            return data + data, kind
        case "deep":
            return draw.choice([b"[" * 100_000, b'{"a":' * 100_000]), kind
    digits = [m.start() for m in re.finditer(rb"\d", data[:100_000])] or [0]
    place = draw.choice(digits)
    return data[:place] + b"9" * 5000 + data[place:], f"digits at {place}"
