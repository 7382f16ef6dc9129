"""Logs as lines of JSON on standard error. They hold no prompt, no answer and no key."""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
import uuid
import warnings
from dataclasses import dataclass, field
from typing import Any

LOG = logging.getLogger("ar2diff.serving")


@dataclass
class Account:
    """What a request has cost, for the log and the metrics.

    Attributes:
        path: one of the server's own, or `other`.
        status: of the answer; 499 if the client went before it was complete.
        size: bytes of its body. prompt_tokens, tokens, forwards: of its rows.
        first: seconds until the first text.
    """

    method: str
    path: str
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    status: int = 499
    size: int = 0
    prompt_tokens: int = 0
    tokens: int = 0
    forwards: int = 0
    first: float | None = None
    started: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        """Since the request has come in."""
        return time.monotonic() - self.started

    def wrote(self) -> None:
        """Note that there is text."""
        if self.first is None:
            self.first = self.seconds

    def tell(self) -> None:
        """Log it."""
        told: dict[str, Any] = {
            "id": self.id, "method": self.method, "path": self.path, "status": self.status,
            "seconds": round(self.seconds, 4),
        }  # fmt: skip
        if self.prompt_tokens:
            told |= {
                "prompt_tokens": self.prompt_tokens, "tokens": self.tokens,
                "forwards": self.forwards, "first_text": self.first and round(self.first, 4),
            }  # fmt: skip
        LOG.info("request", extra={"told": told})


class Lines(logging.Formatter):
    """Writes a record as a JSON object in one line."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "told", {}),
        }
        return json.dumps(line, ensure_ascii=False)


def log_to_stderr() -> None:
    """Send what this server logs, and the warnings of libraries, to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Lines())
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # it tells of every bad request
    LOG.setLevel(logging.INFO)
    warnings.showwarning = lambda message, *_, **__: LOG.warning(str(message))


def log_bug(error: BaseException, account: Account | None = None) -> None:
    """Log where an error came from that nobody has foreseen; its message may quote a prompt.

    Args:
        account: of the request; None: the error has ended the engine.
    """
    frames = [
        f"{frame.filename}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)
    ]
    told = {"id": account.id} if account else {}
    told |= {"error": type(error).__name__, "at": frames[-8:]}
    LOG.error("bug" if account else "the engine has stopped", extra={"told": told})
