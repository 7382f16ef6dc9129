"""Connections that are closed when the headers of a request take too long."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from .gate import HEADERS
from .refusal import Refusal


class Connection(H11Protocol):
    """A connection of uvicorn.

    Attributes:
        headers_within: seconds in which the headers of a request have to arrive.
    """

    headers_within = 15.0
    timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Begin."""
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Take in a part of a request."""
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        """Go on to the next request."""
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """End."""
        super().connection_lost(exc)
        self._stop()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is not HTTP, in the form of other errors."""
        body = json.dumps(Refusal(400, msg).body()).encode()
        own = {**HEADERS, "content-type": "application/json", "connection": "close"}
        headers = [(name.encode(), value.encode()) for name, value in own.items()]
        headers.append((b"content-length", str(len(body)).encode()))
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            for event in (
                h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
                h11.Data(data=body),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _watch(self) -> None:
        """Wait for headers, where there is no request to answer. A connection that was used is
        closed by uvicorn if nothing at all arrives."""
        used = self.cycle is not None
        waits = not used or (self.cycle.response_complete and bool(self.conn.trailing_data[0]))
        if not waits:
            self._stop()
        elif self.timer is None:
            self.timer = self.loop.call_later(self.headers_within, self.transport.abort)

    def _stop(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
