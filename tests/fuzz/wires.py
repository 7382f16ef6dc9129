"""How a request goes over the wire: a list of steps, and the bytes of hostile HTTP."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import bodies

PATHS = ("/v1/completions", "/v1/chat/completions")


@dataclass
class Case:
    """What a client does on one connection.

    Attributes:
        notes: what is wrong with it.
        steps: bytes to send; seconds to wait as numbers; `read`, until an answer has begun;
            `half`, to end what is sent; `reset`, to break the connection.
        answers: how many answers have to come, if that is certain.
        silent: whether there may be no answer: the client has gone, or has asked for nothing.
        headless: whether it is a HEAD request, whose answer has no body.
    """

    notes: list[str] = field(default_factory=list)
    steps: list[Any] = field(default_factory=list)
    answers: int | None = None
    silent: bool = False
    headless: bool = False


def make(seed: int, number: int, heavy: bool = False) -> Case:
    """The case of a seed and a number."""
    draw, case = random.Random(f"{seed}/{number}"), Case()
    ways = [
        (60, plain),
        (8, chunked),
        (8, length),
        (6, leaving),
        (5, pipelined),
        (8, odd),
        (4, raw),
    ]
    ways += [(1, slow), (2, headers)]
    way = draw.choices([w for _, w in ways], [weight for weight, _ in ways])[0]
    case.notes.append(way.__name__)
    way(draw, case, heavy)
    return case


def request(draw: random.Random, case: Case, heavy: bool, spoilt: bool = True) -> tuple[str, bytes]:
    """A path and a body."""
    chat = draw.random() < 0.4
    body: Any = bodies.sound(draw, chat)
    for _ in range(draw.choice([1, 1, 1, 2, 3]) if spoilt else 0):
        case.notes.append(bodies.spoil(draw, body, chat, heavy))
    data, told = bodies.text_of(draw, body) if spoilt else (bodies.hostile.dumps(body), "")
    case.notes += [told] * bool(told)
    return PATHS[chat], data


def head(path: str, *lines: str, method: str = "POST") -> bytes:
    """The head of a request."""
    first = f"{method} {path} HTTP/1.1"
    return "\r\n".join([first, "Host: 127.0.0.1", *lines, "", ""]).encode("latin-1", "replace")


def sent(path: str, data: bytes, *lines: str) -> bytes:
    """A whole request."""
    return (
        head(path, "Content-Type: application/json", f"Content-Length: {len(data)}", *lines) + data
    )


CLOSE = "Connection: close"


def plain(draw: random.Random, case: Case, heavy: bool) -> None:
    path, data = request(draw, case, heavy, spoilt=draw.random() < 0.85)
    case.steps, case.answers = [sent(path, data, CLOSE)], 1


def chunked(draw: random.Random, case: Case, heavy: bool) -> None:
    """A body in chunks, perhaps badly framed."""
    path, data = request(draw, case, heavy)
    size = draw.choice([1, 7, 100, 65536]) if len(data) < 3000 else 65536
    parts = [data[i : i + size] for i in range(0, len(data), size)]
    framed = b"".join(b"%x\r\n%s\r\n" % (len(p), p) for p in parts) + b"0\r\n\r\n"
    fault = draw.choice(["", "", "size", "claim", "cut", "extension", "trailer", "both", "other"])
    case.notes.append(f"chunks of {size} {fault}")
    lines = ["Transfer-Encoding: chunked", CLOSE]
    if fault == "size":
        framed = b"zz\r\n" + framed
    elif fault == "claim":
        framed = b"ffffffffffffffff\r\n" + data
    elif fault == "cut":
        framed = framed[: len(framed) // 2]
    elif fault == "extension":
        framed = framed.replace(b"\r\n", b";a=" + b"b" * 50 + b"\r\n", 1)
    elif fault == "trailer":
        framed = framed[:-2] + b"X-A: b\r\n\r\n"
    elif fault == "both":
        lines.append(f"Content-Length: {len(data)}")
    elif fault == "other":
        lines[0] = draw.choice(["Transfer-Encoding: gzip", "Transfer-Encoding: chunked, chunked"])
    case.steps = [head(path, *lines), framed]
    case.silent = fault in ("cut", "claim")


def length(draw: random.Random, case: Case, heavy: bool) -> None:
    """A length that is not that of the body."""
    path, data = request(draw, case, heavy, spoilt=draw.random() < 0.3)
    size = len(data)
    claims = [
        -1,
        0,
        size // 2,
        size + 10,
        10**12,
        10**30,
        "a",
        "",
        f"{size}, {size}",
        "+5",
        "0x10",
        "٣",
    ]
    claim = draw.choice(claims)
    case.notes.append(f"length {claim!r} for {size}")
    twice = [f"Content-Length: {size}"] * (draw.random() < 0.1)
    case.steps = [head(path, f"Content-Length: {claim}", *twice, CLOSE) + data]
    case.silent = True  # the rest of the body is no request, and one too short never ends


def leaving(draw: random.Random, case: Case, heavy: bool) -> None:
    """A client that goes before it is answered."""
    path, data = request(draw, case, heavy, spoilt=False)
    if draw.random() < 0.5:
        data = data[:-1] + b', "stream": true}' if b'"stream"' not in data else data
    whole = sent(path, data)
    place = draw.choice([len(whole), len(whole), len(whole), len(whole) // 2, 3])
    how = draw.choice(["reset", "half", "close"])
    case.notes.append(f"{how} after {place} of {len(whole)}")
    case.steps = [whole[:place]]
    if place == len(whole) and draw.random() < 0.5:
        case.steps.append("read")
    case.steps.append(how)
    case.silent = True


def pipelined(draw: random.Random, case: Case, heavy: bool) -> None:
    """Several requests at once."""
    count = draw.choice([2, 3, 5])
    last = [[]] * (count - 1) + [[CLOSE]]
    several = [sent(*request(draw, case, False, draw.random() < 0.4), *more) for more in last]
    case.notes.append(f"{count} at once")
    case.steps = [b"".join(several)]


def slow(draw: random.Random, case: Case, heavy: bool) -> None:
    """A client that does not get on."""
    path, data = request(draw, case, False, spoilt=False)
    kind = draw.choice(["silence", "head", "body", "drops", "between"])
    case.notes.append(kind)
    whole = sent(path, data)
    match kind:
        case "silence":
            case.steps = []
        case "head":
            case.steps = [whole[:40]]
        case "body":
            case.steps = [whole[:-5]]
        case "drops":
            case.steps = [whole[:-40]]
            for byte in whole[-40:-1]:
                case.steps += [bytes([byte]), 0.1]
        case "between":
            case.steps = [whole, "read", b"POST "]
    case.silent = True


def headers(draw: random.Random, case: Case, heavy: bool) -> None:
    """Headers that try something."""
    path, data = request(draw, case, False, spoilt=False)
    line = draw.choice([
        "Authorization: Bearer ", "Authorization: Basic Og==", "Authorization: " + "x" * 30_000,
        "Content-Encoding: gzip", "Content-Type: text/plain", "Content-Type: multipart/form-data",
        "Origin: http://evil.example", "Expect: 100-continue", "Expect: something",
        "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
        "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==",
        "Upgrade: h2c", "X-Forwarded-For: \x01\x02", "X: " + "y" * 70_000, "Bad Name: 1", ": 1",
        "X-Request-Id: a\r\n b", "Host: evil.example", "Range: bytes=0-", "If-None-Match: *",
        "\r\n".join(f"X-{i}: {i}" for i in range(3000)), "X-A: \xe9\xff", "Accept: nothing/at-all",
        "X-A: b\nX-B: c", "Connection: keep-alive, close, x", "Keep-Alive: timeout=999999999",
    ])  # fmt: skip
    case.notes.append(line[:60])
    case.steps, case.silent = [sent(path, data, line, CLOSE)], True


def odd(draw: random.Random, case: Case, heavy: bool) -> None:
    """Other paths and methods."""
    path = draw.choice([
        "/", "/health", "/metrics", "/v1/models", "/v1/models/model", "/v1/models/../../x", "/v1",
        "/v1/completions/", "/v1//completions", "/V1/Completions", "/v1/completions?a=b&a=c",
        "/v1/embeddings", "/v1/responses", "/../../../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd",
        "/..%2f..%2fetc%2fpasswd", "/index.html", "/nothing.js", "/%00", "/%ff%fe", "/a" * 20_000,
        "*", "http://evil.example/v1/models", "//evil.example/", "/v1/completions#a", "/docs",
        "/openapi.json", "/%5c..%5c", "/.git/config", "/index.html/", "/static/../app.py", "/;a",
        "/v1/chat/completions;a=b", "/~root", "/?" + "a" * 9000,
    ])  # fmt: skip
    method = draw.choice(["GET", "GET", "GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE", "TRACE",
                          "CONNECT", "PATCH", "get", "X" * 3000, "PROPFIND"])  # fmt: skip
    case.notes.append(f"{method[:10]} {path[:60]}")
    length = ["Content-Length: 2"] if method in ("POST", "PUT") else []
    case.steps = [head(path, CLOSE, *length, method=method) + b"{}" * bool(length)]
    case.headless = method == "HEAD"
    case.silent = len(method) > 10


def raw(draw: random.Random, case: Case, heavy: bool) -> None:
    """Bytes that are no HTTP/1.1."""
    data = draw.choice([
        b"\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/0.9\r\n\r\n", b"GET / HTTP/1.0\r\n\r\n",
        b"GET / HTTP/3.7\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"GET / HTTP/1.1\r\n\r\n", b"GET / HTTP/1.1\nHost: a\n\n", bytes(range(256)) * 20,
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", b"A" * 200_000,
        b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 20_000 + b"\r\n", b"\x00" * 5000, b"{}",
        b"SSH-2.0-x\r\n",
        b"GET  /  HTTP/1.1\r\n\r\n", b"GET /\x00 HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nHost: a\r\n\r\n", bytes(draw.randrange(256) for _ in range(300)),
    ])  # fmt: skip
    case.notes.append(repr(data[:40]))
    case.steps, case.silent = [data], True
