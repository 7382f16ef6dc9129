"""What every request passes: who may ask, headers that keep browsers safe, the log."""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Collection, Sequence
from typing import Any
from urllib.parse import urlsplit

from .log import Account, log_bug
from .refusal import NO_RETRY, Refusal
from .service import Service

HEADERS = {
    "content-security-policy": "default-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; object-src 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}
BUG = "something went wrong in the server; its log says where"
LOOPBACK = ("localhost", "127.0.0.1", "::1")
GUARDED = ("/v1/", "/metrics")  # the page, and whether there is a server, are no secrets
KNOWN = ("/v1/completions", "/v1/chat/completions", "/v1/models", "/health", "/metrics", "/")


class Gate:
    """An ASGI application around another one.

    Args:
        keys: of which a client has to send one; none: anybody may ask who can reach the server,
            but no web page of another host.
        hosts: names under which a server without keys is asked.
    """

    def __init__(
        self,
        app: Any,
        service: Service,
        keys: Sequence[str] = (),
        hosts: Collection[str] = LOOPBACK,
    ):
        self.app, self.service, self.hosts = app, service, hosts
        self.keys = [_digest(key.encode()) for key in keys]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"]
        account = Account(scope["method"][:10], path if path in KNOWN else "other")
        scope.setdefault("state", {})["account"] = account
        began = False

        async def sent(message: Any) -> None:
            nonlocal began
            if message["type"] == "http.response.start":
                began, account.status = True, message["status"]
                more = {**HEADERS, "x-request-id": account.id}
                added = [(name.encode(), value.encode()) for name, value in more.items()]
                message = {**message, "headers": [*message.get("headers", []), *added]}
            await send(message)

        try:
            self._check(scope)
            await self.app(scope, receive, sent)
        except Refusal as refusal:
            await _refuse(sent, refusal)
        except ConnectionError:
            account.status = 499
        except Exception as error:
            log_bug(error, account)
            if not began:
                await _refuse(sent, Refusal(500, BUG, headers=NO_RETRY))
        finally:
            account.tell()
            self._count(account)

    def _check(self, scope: Any) -> None:
        """Refuse who may not ask.

        Raises:
            Refusal: the key is missing or wrong, or a browser asks for a page of another host.
        """
        headers = {name.decode("latin-1"): value for name, value in scope["headers"]}
        if self.keys:
            if scope["path"].startswith(GUARDED):
                self._check_key(headers.get("authorization", b""))
            return
        host = headers.get("host", b"").decode("latin-1")
        if host and _name(f"//{host}") not in self.hosts:
            raise Refusal(403, "this server answers to the names of this machine alone")
        origin = headers.get("origin", b"").decode("latin-1")
        if origin and origin.partition("//")[2] != host:
            raise Refusal(403, "this server does not answer pages of other hosts")

    def _check_key(self, given: bytes) -> None:
        kind, _, key = given.partition(b" ")
        digest = _digest(key.strip()) if kind.lower() == b"bearer" else b""
        if not any([hmac.compare_digest(digest, own) for own in self.keys]):
            raise Refusal(
                401, "the API key is missing or wrong; send 'Authorization: Bearer KEY'", None,
                "invalid_api_key", {"www-authenticate": "Bearer"},
            )  # fmt: skip

    def _count(self, account: Account) -> None:
        metrics, path = self.service.metrics, account.path
        metrics.requests.labels(path, str(account.status)).inc()
        if account.prompt_tokens:
            metrics.seconds.labels(path).observe(account.seconds)
            if account.first is not None:
                metrics.first.labels(path).observe(account.first)


def _name(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


async def _refuse(send: Any, refusal: Refusal) -> None:
    body = json.dumps(refusal.body()).encode()
    headers = {
        **refusal.headers, "content-type": "application/json", "content-length": str(len(body)),
    }  # fmt: skip
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": refusal.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
