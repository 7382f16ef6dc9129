"""How much a request may ask for and how long it may take, and reading its body within that."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from .refusal import NO_RETRY, Refusal

EXCESS = 4  # times the limit that is read of a body that is too large, so that its sender listens
SEEING = 32 << 20  # bytes of a body that may hold images
SMALL = 1 << 16  # bytes of a body that is read in no time


@dataclass(frozen=True)
class Limits:
    """Limits of a server.

    Attributes:
        tokens: of an answer.
        seconds: of a request, from the end of its body to the end of its answer.
        rows: answers that a request may ask for, over all its prompts.
        images: that a request may have. pixels: of each. all_pixels: of them together, since the
            model's processor holds all of them at once.
        body: bytes of a request. patience: seconds in which they have to arrive.
        headers: seconds in which the headers of a request have to arrive.
        leave: seconds beyond `seconds` in which a client has to have read its answer.
    """

    tokens: int = 4096
    seconds: float = 600.0
    rows: int = 128
    images: int = 16
    pixels: int = 32 << 20
    all_pixels: int = 64 << 20
    body: int = 8 << 20
    patience: float = 30.0
    headers: float = 15.0
    leave: float = 60.0


async def read_body(receive: Any, headers: dict[str, str], limits: Limits) -> bytes:
    """The body of a request.

    Raises:
        Refusal: it is too large, or arrives too slowly.
        ConnectionError: the client has gone.
    """
    if limits.body < int(_length(headers) or 0):
        if "expect" not in headers:
            await _discard(receive, limits, 0)
        raise _too_large(limits)
    parts, size = [], 0
    try:
        async with asyncio.timeout(limits.patience):
            more = True
            while more:
                part, more = await _next(receive)
                size += len(part)
                if size > limits.body:
                    break
                parts.append(part)
    except TimeoutError:
        raise Refusal(
            408, f"the body did not arrive within {limits.patience:g} seconds; send it faster",
            None, "slow_body", {**NO_RETRY, "connection": "close"},
        ) from None  # fmt: skip
    if size > limits.body:
        if more:
            await _discard(receive, limits, size)
        raise _too_large(limits)
    return b"".join(parts)


def _length(headers: dict[str, str]) -> str | None:
    text = headers.get("content-length", "")
    return text if text.isdecimal() and len(text) < 20 else None


async def _next(receive: Any) -> tuple[bytes, bool]:
    message = await receive()
    if message["type"] == "http.disconnect":
        raise ConnectionError
    return message.get("body", b""), message.get("more_body", False)


async def _discard(receive: Any, limits: Limits, size: int) -> None:
    """Read on for a while: a client that is still sending would not see the answer."""
    try:
        async with asyncio.timeout(limits.patience / 4):
            more = True
            while more and size <= EXCESS * limits.body:
                part, more = await _next(receive)
                size += len(part)
    except TimeoutError:
        pass


def _too_large(limits: Limits) -> Refusal:
    return Refusal(
        413, f"the body has more than {limits.body:,} bytes; send less at once", None,
        "body_too_large", {"connection": "close"},
    )  # fmt: skip
