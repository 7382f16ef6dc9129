"""The command line in a process of its own, one command after another: huggingface_hub reads where
the Hub is when it is imported, and there it is a stand-in.

Reads lines of JSON {"arguments": [...], "environment": {name: value or null}} on stdin, and answers
each with {"code", "out", "err"} on stdout.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Done:
    """A command that has ended."""

    code: int
    out: str
    err: str


class Client:
    """That process. Use as a context manager.

    Args:
        home: for its caches. url: of the Hub. token: of the user, unless a command has another.
    """

    def __init__(self, home: Path, url: str, token: str):
        self.token = token
        self.environment = hub_environment(home, url)
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()

    def run(self, *arguments: object, **environment: str | None) -> Done:
        asked = {
            "arguments": [str(argument) for argument in arguments],
            "environment": {"HF_TOKEN": self.token, **environment},
        }
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        return Done(**json.loads(self.process.stdout.readline()))


def hub_environment(home: Path, url: str) -> dict[str, str]:
    """An environment whose Hub is at `url`, without a token."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING_FACE_"))}
    return kept | {
        "HF_HOME": str(home),
        "HF_ENDPOINT": url,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1",
    }


def serve() -> None:
    from ar2diff.cli.main import main

    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        asked = json.loads(line)
        for name, value in asked["environment"].items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})
        sys.argv, code = ["ar2diff", *asked["arguments"]], 0
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            try:
                main()
            except SystemExit as stop:
                code = stop.code
        print(
            json.dumps({"code": code, "out": out.getvalue(), "err": err.getvalue()}),
            file=answers,
            flush=True,
        )


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    serve()
