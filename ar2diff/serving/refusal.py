"""Answers that refuse a request, in the form that OpenAI's clients read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..core.errors import Ar2DiffError

NO_RETRY = {"x-should-retry": "false"}  # OpenAI's clients repeat 408, 409, 429 and 5xx otherwise
KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class Refusal(Exception):
    """A request that is refused.

    Args:
        status: of HTTP.
        message: what is wrong and what to do about it.
        param: the field of the request that is to blame.
        code: a word for programs.
        headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The error as a JSON object."""
        kind = KINDS.get(self.status)
        kind = kind or ("server_error" if self.status >= 500 else "invalid_request_error")
        inner = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": inner}


def refused(
    error: Ar2DiffError, field_of: Callable[[str], str], subject: str | None = None
) -> Refusal:
    """A 400 that says what an error of the sampler says.

    Args:
        field_of: the request's field for an option of `generate`.
        subject: the field that an error is about which names no option.
    """

    def written(name: str, value: str | None) -> str:
        return field_of(name) if value is None else f"{field_of(name)}={value}"

    told = error.named(written)
    param = field_of(error.option) if error.option else subject
    return Refusal(400, f"{told.what}; {told.fix}", param)


def gone() -> Refusal:
    """A 503: the engine writes nothing any more."""
    return Refusal(
        503, "the engine has stopped; the server has to be started again", None, "engine_gone",
        NO_RETRY,
    )  # fmt: skip


def busy() -> Refusal:
    """A 429: too much is waiting."""
    return Refusal(
        429, "too many requests are waiting; try again later", None, "queue_full",
        {"retry-after": "1"},
    )  # fmt: skip
