"""The command line in a process of its own, one command after another: huggingface_hub reads where
the Hub is when it is imported, and there it is a stand-in.

Reads lines of JSON {"arguments": [...], "environment": {name: value or null}} on stdin, and answers
each with {"code", "out", "err"} on stdout. With "child": {...} a forked child runs the command, as
`kills.in_a_child` does with these values, and the answer is what that returns.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from kills import in_a_child


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
        return Done(**self._ask(arguments, environment={"HF_TOKEN": self.token, **environment}))

    def run_in_a_child(self, *arguments: object, **child: int | str) -> tuple[int, int]:
        """Have a forked child run a command; see `kills.in_a_child`."""
        return self._ask(arguments, environment={"HF_TOKEN": self.token}, child=child)

    def _ask(self, arguments: tuple[object, ...], **more: object) -> Any:
        asked = {"arguments": [str(argument) for argument in arguments], **more}
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


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
        sys.argv = ["ar2diff", *asked["arguments"]]
        work = partial(command, main)
        answer = in_a_child(work, **asked["child"]) if "child" in asked else work()
        print(json.dumps(answer), file=answers, flush=True)


def command(main: Callable[[], None]) -> dict[str, Any]:
    """Run the command line; code, out and err."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with redirect_stdout(out), redirect_stderr(err):
        try:
            main()
        except SystemExit as stop:
            code = stop.code
    return {"code": code, "out": out.getvalue(), "err": err.getvalue()}


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    serve()
