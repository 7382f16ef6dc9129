"""How much a request may ask for, and how long it may take."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Limits of a server.

    Attributes:
        tokens: of an answer. seconds: of a request, from its last byte on.
        rows: answers that a request may ask for, over all its prompts.
        body: bytes of a request. patience: seconds in which it has to arrive.
        headers: seconds in which its headers have to.
    """

    tokens: int = 4096
    seconds: float = 600.0
    rows: int = 128
    body: int = 8 << 20
    patience: float = 30.0
    headers: float = 15.0
