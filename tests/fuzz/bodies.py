"""Bodies of requests to a server: sound ones, and what is done to them."""

from __future__ import annotations

import json
import random
from copy import deepcopy
from typing import Any

import drawn_schemas
import hostile

WORDS = "Tom Mia had 3 4 apples stickers and gave to the cat . He picked up".split()
OBJECT = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
TOOL = {"type": "function", "function": {"name": "add", "parameters": OBJECT}}
FIELDS: dict[str, list[Any]] = {
    "n": [1, 2, 3], "stop": ["Mia", ["a", "b"]], "seed": [0, 7], "stream": [True, False],
    "temperature": [0, 0.7], "top_p": [0.9, 1], "top_k": [0, 5], "min_p": [0.1], "drafts": [True],
    "logit_bias": [{"5": 1.5}], "user": ["someone"], "min_tokens": [1],
    "repetition_penalty": [1.2], "mode": ["ar", "speculative", "diffusion"],
    "threshold": [0.9], "steps_per_block": [2], "entropy_bound": [0.5], "block_length": [4],
    "draft_length": [3], "choice": [["yes", "no"]], "regex": [" [a-c]{1,3}"],
    "stream_options": [{"include_usage": True}], "presence_penalty": [0], "metadata": [{"a": 1}],
    "store": [True], "model": ["model"],
}  # fmt: skip
OF_TEXTS: dict[str, list[Any]] = {
    "suffix": [" Tom.", ""], "echo": [True], "logprobs": [0, 1], "best_of": [1, 2],
    "json_schema": [OBJECT], "revise": [[[0, 3]]],
}  # fmt: skip
OF_CHATS: dict[str, list[Any]] = {
    "response_format": [
        {"type": "json_schema", "json_schema": {"name": "a", "schema": OBJECT}},
        {"type": "json_object"}, {"type": "text"},
    ],
    "tools": [[TOOL]], "tool_choice": ["auto", "none", "required"], "logprobs": [True],
    "top_logprobs": [0, 1], "max_completion_tokens": [2], "parallel_tool_calls": [False],
    "reasoning_effort": ["none"],
}  # fmt: skip

# Each is asked of an automaton that is made in another process: see `heavy`.
REGEXES = [
    "(a|aa)+b", "(x+x+)+y", "a{1,1000}", "(a{1,9}){1,9}", "(?=a)b", r"\1", "^a$", "[", "(", "*",
    "a**",
    "", ".*", "[^\\x00-\\x{10FFFF}]", "\\p{L}{1,40}", "é{2}", "\x00", "\ud800", "(?i)straße",
    "(?P<n>a)(?P=n)", "a" * 3000, "(" * 400 + "a" + ")" * 400,
    "|".join(f"w{i}" for i in range(500)),
    "[a-z]{0,4}" * 60, "\\", "a{2,1}", "a{99999999999}", "(?s).", "\\w+@\\w+", "\U0010ffff",
]  # fmt: skip
EXPLODE = [
    "(.*a.*b){40}",
    "((a|b)*c){200}",
    "(a?){4000}a{4000}",
    ".{0,3000}",
    "(\\w{1,64}\\W){1,64}",
]
SCHEMAS: list[Any] = [
    {"$ref": "#"}, {"$ref": "http://127.0.0.1:9/a"}, {"$ref": "file:///etc/passwd"},
    {"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}, {"type": "null"}]}}},
    {"type": "string", "minLength": 10**9}, {"type": "string", "maxLength": -1},
    {"type": "string", "pattern": "(a|aa)+$"}, {"type": "string", "pattern": "(?=a)"},
    {"type": "array", "items": {"type": "array", "items": {"$ref": "#"}}, "minItems": 10**6},
    {"enum": []}, {"enum": [{}, [], None, 1e308, "\ud800"]}, {"const": "x" * 20_000},
    {"type": ["integer", "other"]}, {"type": 5}, {"properties": []}, {"required": {"a": 1}}, True,
    False, {}, {"allOf": []}, {"anyOf": [{}] * 200}, {"not": {}}, {"minimum": 0},
    {"format": "\x00"},
    {"type": "object", "properties": {f"k{i}": {"type": "string"} for i in range(300)}},
    {"type": "object", "properties": {"\n\"\\": {"type": "null"}}, "required": ["\n\"\\"]},
    {"type": "object", "patternProperties": {"(a+)+$": {}}}, {"title": {"$ref": "#"}},
    {"oneOf": [{"type": "null"}, {"type": "null"}]}, {"$id": "http://a/", "$ref": "b"},
    {"prefixItems": [{"type": "integer"}] * 100, "items": False},
]  # fmt: skip
GRAMMARS = [
    "start: start", "start: a\na: b\nb: a", "start: ", "", "start: \"a\" start | \"a\"",
    "start: /(/",
    "start: /(a|aa)+/", "start: x*\nx: ", "%import common.WORD\nstart: WORD",
    "start: \"" + "a" * 9999,
    "start: " + "(" * 2000, "start: \"a\"~1..1000000", "start: <[1]>",
    "%llguidance {}\nstart: \"a\"",
    "start: %json {\"$ref\": \"file:///etc/passwd\"}", "\x00", "start: \"\ud800\"",
    "start: (\"a\"?)~900",
]  # fmt: skip
CHOICES: list[Any] = [
    [], [""], ["a"] * 500, [f"w{i}" for i in range(2000)], ["\x00"], ["\ud800"], ["x" * 5000], [1],
    ["a", None], "yes", [["a"]], {"a": 1},
]  # fmt: skip
MESSAGES: list[Any] = [
    [], "hi", [None], [{}], [{"role": "user"}], [{"role": "king", "content": "a"}],
    [{"role": "user", "content": None}], [{"role": "user", "content": []}],
    [{"role": "user", "content": [{"type": "text", "text": "a"}]}],
    [{"role": "user", "content": [{"type": "text"}]}],
    [{"role": "user", "content": [{"type": "image_url",
    "image_url": {"url": "file:///etc/passwd"}}]}],
    [{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "AA=="}}]}],
    [{"role": "assistant", "content": "a"}], [{"role": "system", "content": "a"}] * 3,
    [{"role": "tool", "content": "a", "tool_call_id": "nobody"}],
    [{"role": "assistant", "content": None, "tool_calls": [{"id": 1}]}],
    [{"role": "assistant", "tool_calls": [{"id": "a", "type": "function", "function": {"name": "f",
      "arguments": "{"}}]}],
    [{"role": "user", "content": "{{ 7 * 7 }}{% for i in range(10**9) %}{% endfor %}"}],
    [{"role": "user", "content": "a", "name": "\x00", "extra": {"deep": [[[]]]}}],
    [{"role": "user", "content": "a"}] * 400, [{"role": ["user"], "content": {"text": "a"}}],
    [{"role": "user", "content": "<s></s><|mask|>{mask:3}"}],
]  # fmt: skip
TOOLS: list[Any] = [
    [], {}, [None], [{}], [{"type": "other"}], [{"type": "function"}], [TOOL, TOOL], [TOOL] * 100,
    [{"type": "function", "function": {"name": ""}}],
    [{"type": "function", "function": {"name": "a\n\"}}{{ x }}", "parameters": OBJECT}}],
    [{"type": "function", "function": {"name": "f", "parameters": "none"}}],
    [{"type": "function", "function": {"name": "f", "description": 5, "strict": "yes"}}],
    *([{"type": "function", "function": {"name": "f", "parameters": s}}] for s in SCHEMAS[:8]),
]  # fmt: skip
PROMPTS: list[Any] = [
    "", " ", [], [[]], [""], [1, 2], [[1, 2], [3]], [-1], [10**9], [2**63], [True], [1.0], [None],
    ["a", [1]], ["a"] * 40, {"a": 1}, 5, None, "\x00", "\ud800", "a" * 40_000, "🦙" * 300,
    "\u202e\ufeff",
    "<s></s>", "<|mask|>", "{mask:3}", [5] * 300, [895], [896], [[5]] * 20,
    "a\r\n\r\nGET / HTTP/1.1",
]  # fmt: skip
COUNTS: list[Any] = [0, -1, 1, 10**9, 2**31, 2**63, 10**400, 1.0, 0.5, True, "1", None, [1]]
KEYS = ["prompt", "max_tokens", "n", "model", "stream", "messages"]


def sound(draw: random.Random, chat: bool) -> dict[str, Any]:
    """A request that may well be answered, in a few forwards."""
    text = " ".join(draw.choice(WORDS) for _ in range(draw.randrange(1, 6)))
    body: dict[str, Any] = {"max_tokens": draw.randrange(1, 7)}
    if chat:
        body["messages"] = [{"role": "user", "content": text}]
    else:
        body["prompt"] = text
    own = {**FIELDS, **(OF_CHATS if chat else OF_TEXTS)}
    for name in draw.sample(sorted(own), draw.randrange(4)):
        body[name] = deepcopy(draw.choice(own[name]))
    return body


def spoil(draw: random.Random, body: dict[str, Any], chat: bool, heavy: bool) -> str:
    """Do something to a request; returns what.

    Args:
        heavy: whether it may ask for automata that take seconds.
    """
    kinds: list[tuple[str, list[Any]]] = [
        ("max_tokens", COUNTS), ("n", COUNTS), ("best_of", COUNTS), ("seed", COUNTS),
        ("logprobs", COUNTS), ("stop", [*hostile.TREES, *hostile.TEXTS, ["a"] * 99]),
        ("logit_bias", [{"a": 1}, {"5": 1e400}, {"-1": 1}, {"99999999": 1}, {"5": None}, [5],
        {"5": 999}]),
        ("stream_options", [{}, [], {"other": 1}, {"include_usage": "yes"}]),
        ("temperature", [-1, 1e308, "hot", None, 1e-320]), ("top_p", [0, -1, 2, 1e-30]),
        ("top_k", [-1, 10**9]), ("mode", ["", "AR", "other", None, 5, ["ar"]]), ("choice", CHOICES),
        ("regex", REGEXES), ("grammar", GRAMMARS), ("model", ["", "../../etc", 5, "x" * 9999]),
        ("threshold", [-1, 2, 0, 1e-9]), ("steps_per_block", [0, 10**9]), ("block_length", [0, 3,
        10**9]),
        ("draft_length", [0, 10**9]), ("entropy_bound", [-1, 1e308]), ("min_tokens", COUNTS),
    ]  # fmt: skip
    drawn = [drawn_schemas.generated(draw)] if heavy else []
    if heavy:
        kinds += [("regex", EXPLODE)]
    if chat:
        formats = [
            {"type": "json_schema", "json_schema": {"name": "a", "schema": s}}
            for s in (*SCHEMAS, *drawn * 30)
        ]
        kinds += [("messages", MESSAGES)] * 6 + [("tools", TOOLS)] * 4
        kinds += [("response_format", formats)] * 3 + [("max_completion_tokens", COUNTS)]
        kinds += [
            (
                "tool_choice",
                [{}, {"type": "function"}, {"type": "function", "function": {"name": "no"}}],
            )
        ]
    else:
        kinds += [("prompt", PROMPTS)] * 6 + [("json_schema", [*SCHEMAS, *drawn * 30])] * 3
        kinds += [("suffix", hostile.TEXTS), ("revise", [*hostile.TREES, [[0, 1]] * 99, [[5, 3]]])]
        kinds += [("suffix", [PROMPTS[20], " Tom."])]
    way = draw.random()
    if way < 0.75:
        name, values = draw.choice(kinds)
        body[name] = deepcopy(draw.choice(values))
        return f"{name} = {hostile.shown(body[name])}"
    if way < 0.9:
        _, told = hostile.mutate_tree(draw, body)
        return told
    if way < 0.97:
        name = draw.choice([*hostile.TEXTS, "functions", "Prompt", "max_token", "__class__"])
        body[name] = hostile.value(draw)
        return f"new: {hostile.shown(name)} = {hostile.shown(body[name])}"
    for name in KEYS:
        body.pop(name, None)
    return "nearly nothing"


def text_of(draw: random.Random, body: Any) -> tuple[bytes, str]:
    """A body as JSON, perhaps damaged, and what was done."""
    data = hostile.dumps(body)
    way = draw.random()
    if way < 0.8:
        return data, ""
    if way < 0.9:
        return hostile.mutate_bytes(draw, data)
    if way < 0.95 and data.startswith(b"{") and len(data) > 2:
        name = draw.choice(KEYS)
        return b'{"%s": 1, ' % name.encode() + data[1:], f"{name} twice"
    draws = (
        b"null", b"[]", b"5", b'"a"', b"{}", b"", b" ", json.dumps([body]).encode() * 2,
        b"\xff" * 100, b"{" * 100_000, b'{"prompt": NaN}', b"a=b&c=d", bytes(1000),
    )  # fmt: skip
    other = draw.choice(draws)
    return other, f"{hostile.shown(other)} in its place"
