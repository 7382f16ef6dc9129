"""The HTTP interface: paths, and how answers leave."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Collection, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.staticfiles import StaticFiles

from ..config.safe_json import parse_json
from .chat import chat
from .completions import complete
from .conversation import ChatRequest
from .gate import BUG, KNOWN, LOOPBACK, Gate
from .limits import SMALL, Limits, read_body
from .log import Account, log_bug
from .protocol import CompletionRequest, Kind, read_request
from .refusal import NO_RETRY, Refusal
from .replies import Reply
from .service import Service

PAGE = Path(__file__).parent / "page"
Found = TypeVar("Found")


def create_app(
    service: Service, keys: Sequence[str] = (), hosts: Collection[str] = LOOPBACK
) -> Gate:
    """The application.

    Args:
        keys, hosts: as of `Gate`.
    """

    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    app.add_exception_handler(Refusal, _refusal)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _bug)
    about = {"id": service.name, "object": "model", "created": 0, "owned_by": "ar2diff"}
    about["ar2diff"] = service.described

    @app.get("/v1/models")
    async def models() -> Any:
        return {"object": "list", "data": [about]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Any:
        service.check_model(name)
        return about

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await _answer(service, request, CompletionRequest, complete)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await _answer(service, request, ChatRequest, chat)

    @app.get("/health")
    async def health() -> Response:
        if service.engine.alive:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "the engine has stopped"}, 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    app.mount("/", Page(directory=PAGE, html=True))
    return Gate(app, service, keys, hosts)


class Page(StaticFiles):
    """The files of the page, which a browser asks for anew each time."""

    async def get_response(self, path: str, scope: Any) -> Response:
        """A file."""
        if scope["path"] in KNOWN and path != ".":
            raise HTTPException(405)
        if scope["path"].startswith("/v1"):
            raise HTTPException(404)
        response = await super().get_response(path, scope)
        response.headers["cache-control"] = "no-cache"
        return response


async def _answer(service: Service, request: Request, kind: type[Kind], ask: Any) -> Response:
    """Answer a request for text.

    Args:
        ask: begins the answers, as `complete`.
    """
    body = await read_body(request.receive, dict(request.headers), service.limits)
    request.state.account.size = len(body)
    if len(body) < SMALL:
        asked = _read(kind, body)
    else:
        asked = await service.plain.run(_read, kind, body)
    try:
        reply = await unless_gone(request.receive, ask(service, asked, request.state.account))
        if asked.stream:
            return Stream(reply, service.limits)
        try:
            return JSONResponse(await unless_gone(request.receive, reply.whole()))
        finally:
            reply.answers.cancel()
    except Gone:
        return Response(status_code=499)


def _read(kind: type[Kind], body: bytes) -> Kind:
    try:
        value = parse_json(body, constants=False, twice=False)
    except ValueError as error:
        raise Refusal(400, f"the body is not JSON: {error}") from None
    return read_request(kind, value)


class Stream(Response):
    """Events, as long as the client is there.

    Args:
        reply: whose parts are sent.
    """

    def __init__(self, reply: Reply, limits: Limits):
        self.reply, self.limits = reply, limits
        self.status_code, self.background = 200, None
        self.init_headers({"content-type": "text/event-stream", "cache-control": "no-store"})
        del self.headers["content-length"]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send them."""
        try:
            async with asyncio.timeout(self.limits.seconds + self.limits.leave):
                await unless_gone(receive, self._send(send, scope["state"]["account"]))
        except Gone:
            scope["state"]["account"].status = 499
        finally:
            self.reply.answers.cancel()

    async def _send(self, send: Any, account: Account) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async with aclosing(self.reply.chunks()) as chunks:
            try:
                async for chunk in chunks:
                    await self._event(send, chunk)
            except Refusal as refusal:
                await self._event(send, refusal.body())
            except Exception as error:
                log_bug(error, account)
                await self._event(send, Refusal(500, BUG).body())
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    async def _event(self, send: Any, value: dict[str, Any]) -> None:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        body = f"data: {text}\n\n".encode()
        await send({"type": "http.response.body", "body": body, "more_body": True})


class Gone(Exception):
    """The client has gone."""


async def unless_gone(receive: Any, work: Awaitable[Found]) -> Found:
    """What some work comes to; it is dropped if the client goes before.

    Raises:
        Gone: it has.
    """
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait([working, leaving], return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise Gone
    finally:
        leaving.cancel()
        working.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _left(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _refusal(_: Request, refusal: Exception) -> Response:
    assert isinstance(refusal, Refusal)
    return JSONResponse(refusal.body(), refusal.status, refusal.headers)


async def _bug(_: Request, __: Exception) -> Response:
    """The answer to an error that nobody has foreseen, which goes on to the gate and its log."""
    refusal = Refusal(500, BUG, headers=NO_RETRY)
    return JSONResponse(refusal.body(), 500, refusal.headers)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    told = {404: "there is nothing at this path", 405: "this path takes another method"}
    known = "; OpenAI's interface is at /v1: /v1/models, /v1/completions, /v1/chat/completions"
    message = told.get(error.status_code, "the request cannot be answered") + known
    refusal = Refusal(error.status_code, message, headers=error.headers)
    return JSONResponse(refusal.body(), refusal.status, refusal.headers)
