"""Hostile clients: the server answers them in the form of OpenAI's errors, within its limits, and
its other clients get their text as always."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from served import chat_model

sys.path.append(str(Path(__file__).parent / "fuzz"))

import server as fuzz
import wires

MEMORY = 2 << 30  # bytes that the server may have taken in the end


@pytest.fixture(scope="module")
def attacked(tmp_path_factory):
    work = tmp_path_factory.mktemp("served")
    with fuzz.serving(chat_model(work / "model"), work) as server:
        yield server


def held(server: fuzz.Server, found: dict[str, list[int]]) -> None:
    assert not found
    assert server.process.poll() is None
    assert not server.bugs()
    assert server.rss() < MEMORY


def test_500_hostile_requests(attacked):
    found, statuses = fuzz.attack(attacked, seed=0, numbers=range(500), heavy=False)
    held(attacked, found)
    assert statuses[b"200"] > 50 and statuses[b"400"] > 200


@pytest.mark.slow
def test_10000_hostile_requests(attacked):
    pytest.importorskip("outlines_core")
    found, statuses = fuzz.attack(attacked, seed=1, numbers=range(10_000), heavy=True, every=1)
    held(attacked, found)
    assert statuses[b"200"] > 1000 and statuses[b"400"] > 4000


ERROR = {"message": "no", "type": "invalid_request_error", "param": None, "code": None}


def answer(status: int, body: object, kind: str = "application/json") -> bytes:
    text = body if isinstance(body, str) else json.dumps(body)
    head = f"HTTP/1.1 {status} X\r\nContent-Type: {kind}\r\nContent-Length: {len(text)}\r\n\r\n"
    return (head + text).encode()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"garbage",
        answer(200, {})[:-1],
        answer(200, "{"),
        answer(200, '{"a": NaN}'),
        answer(500, {"error": ERROR}),
        answer(503, {"error": ERROR}),
        answer(400, {"detail": "no"}),
        answer(400, {"error": "no"}),
        answer(400, {"error": ERROR}, "text/plain"),
        answer(400, {"error": {**ERROR, "message": ""}}),
        answer(400, {"error": {**ERROR, "message": "x" * 5000}}),
        answer(400, {"error": {**ERROR, "message": 'Traceback: File "/a.py"'}}),
        answer(200, "data: {}\n\n", "text/event-stream"),
        answer(200, {}) * 2,
    ],
)
def test_the_judge_sees_what_is_wrong(data):
    case = wires.Case(steps=[b"x"], answers=1)
    assert [*fuzz.judge(case, data, 0.0)]
    assert [*fuzz.judge(case, answer(400, {"error": ERROR}), fuzz.LIMIT + 1)]
    for good in (answer(400, {"error": ERROR}), answer(200, {}),
                 answer(200, "data: {}\n\ndata: [DONE]\n\n", "text/event-stream")):  # fmt: skip
        assert not [*fuzz.judge(case, good, 0.0)]
