"""A server that is asked 10,000 times holds in the end what it held when it was warm."""

from __future__ import annotations

import os
import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from served import Process, ask, chat_model, until

REQUESTS, WARM, CLIENTS = 10_000, 4_000, 8
GROWTH = 16 << 20  # bytes between the fourth thousand and the last
EXPRESSIONS = 80  # more than there are automata that a tokenizer's cache keeps
WORDS = "Tom Mia Ben had got 3 4 7 apples coins stickers and then more in the box today .".split()


def asked(number: int) -> tuple[str, dict]:
    """A path and a short request; every kind comes up now and then, and a few are refused."""
    draw = random.Random(number)
    text = " ".join(draw.choices(WORDS, k=draw.randrange(3, 40)))
    body = {"prompt": text, "max_tokens": draw.randrange(1, 9), "stream": draw.random() < 0.5}
    body["mode"] = draw.choice(["ar", "speculative", "diffusion"])
    match draw.randrange(20):
        case 0:
            body |= {"temperature": 1.0, "seed": number, "n": 3}
        case 1:
            body |= {"suffix": " the end.", "mode": "diffusion"}
        case 2:
            body |= {"stop": ["Mia", "."], "logprobs": 0}
        case 3:
            body |= {"drafts": True, "stream": True}
        case 4:
            body["top_p"] = "no number"
        case 5:
            body |= {"regex": f" ({draw.randrange(EXPRESSIONS)}|b)", "max_tokens": 9}
        case 6:
            body |= {"echo": True, "logprobs": 1, "stream": False}
            del body["mode"]
        case 7 | 8:
            del body["prompt"]
            body["messages"] = [{"role": "user", "content": text}]
            return "/v1/chat/completions", body
    return "/v1/completions", body


def told(server: Process, number: int) -> tuple[int, object, bytes]:
    path, body = asked(number)
    return ask(server.url, path, "POST", body)


class State:
    """What a server holds while it does nothing."""

    def __init__(self, server: Process):
        until(lambda: not busy(server), "rows that are over")
        place = Path(f"/proc/{server.process.pid}")
        until(lambda: not sockets(place), "connections that are closed")
        self.memory = int((place / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        self.threads = len([*(place / "task").iterdir()])
        self.files = len([*(place / "fd").iterdir()])


def sockets(place: Path) -> bool:
    """Whether there are sockets beside the one that listens and those that the loop has."""
    links = [str(link.readlink()) for link in (place / "fd").iterdir() if link.is_symlink()]
    return sum(link.startswith("socket:") for link in links) > 3


def busy(server: Process) -> bool:
    lines = server.get("/metrics")[2].decode().splitlines()
    return any(line.startswith("ar2diff_rows_") and not line.endswith(" 0.0") for line in lines
               if "total" not in line)  # fmt: skip


@pytest.mark.slow
def test_10000_requests_leave_nothing_behind(tmp_path):
    pytest.importorskip("outlines_core")
    server = Process(chat_model(tmp_path / "model"), "--prefix-cache", 8)
    statuses: Counter[int] = Counter()
    states = []
    try:
        with ThreadPoolExecutor(CLIENTS) as pool:
            for first in range(0, REQUESTS, 1000):
                work = range(first, first + 1000)
                answers = pool.map(lambda n: told(server, n), work)
                statuses.update(status for status, _, _ in answers)
                states.append(State(server))
                print(vars(states[-1]), flush=True)
        assert set(statuses) == {200, 400} and statuses[400] < REQUESTS / 10
        assert server.process.poll() is None
        warm, last = states[WARM // 1000 - 1], states[-1]
        assert last.threads == warm.threads and last.files == warm.files
        assert last.memory - warm.memory < GROWTH
    finally:
        server.close()
