"""Servers for tests: a process of its own, or one in this process that can be looked into."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TEMPLATE = Path(__file__).with_name("tools.jinja")
LONG = 60  # seconds that anything may take on a busy machine


def chat_model(folder: Path) -> Path:
    """The embedded model, converted without training, with a template for chats and tools."""
    from ar2diff.config.recipe import load_recipe
    from ar2diff.training.adapt import adapt

    recipe = load_recipe("demo", ["train.max_steps=0"])
    adapt(str(ROOT / "ar2diff" / "demo" / "model"), recipe, folder)
    shutil.copy(TEMPLATE, folder / "chat_template.jinja")
    config = json.loads((folder / "config.json").read_text())
    config["max_position_embeddings"] = 2048
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def until(true, what):
    """Wait until something holds."""
    end = time.monotonic() + LONG
    while not true():
        assert time.monotonic() < end, f"{what}: not within {LONG} s"
        time.sleep(0.01)


class Process:
    """`ar2diff serve` in a process of its own, on a free port.

    Attributes:
        url: of the server. lines: of its log so far, as dictionaries.
    """

    def __init__(self, *arguments):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "ar2diff", "serve", *map(str, arguments), "--port", "0"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )
        self.raw: list[str] = []
        threading.Thread(target=self._read, daemon=True).start()
        until(lambda: self.told("ready") or self.process.poll() is not None, "a server")
        assert self.told("ready"), "".join(self.raw)
        self.url = self.told("ready")[0]["url"]

    def _read(self):
        for line in self.process.stderr:
            self.raw.append(line)

    @property
    def lines(self):
        return [json.loads(line) for line in [*self.raw] if line.startswith("{")]

    def told(self, event):
        return [line for line in self.lines if line["event"] == event]

    def get(self, path, method="GET", body=None, **headers):
        """(status, headers, body) of a request."""
        return ask(self.url, path, method, body, **headers)

    def stop(self, number=signal.SIGTERM):
        """The exit code after a signal."""
        self.process.send_signal(number)
        return self.process.wait(LONG)

    def close(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.process.stdout.close()


def ask(url, path, method="GET", body=None, **headers):
    """(status, headers, body) of a request; a dictionary as a body is sent as JSON."""
    place = url.removeprefix("http://")
    connection = http.client.HTTPConnection(place, timeout=LONG)
    if isinstance(body, dict):
        body, headers = json.dumps(body), {"content-type": "application/json", **headers}
    try:
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()
    finally:
        connection.close()


@contextmanager
def in_process(service, **options):
    """The URL of a server in this process, while the context lasts."""
    from ar2diff.serving.server import http_server

    server = http_server(service, **options)
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])))
    thread.start()
    try:
        until(lambda: server.started, "a server in this process")
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = server.force_exit = True
        thread.join(LONG)
        listener.close()
