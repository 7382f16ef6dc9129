"""The HTTP interface."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.staticfiles import StaticFiles

from ..config.safe_json import parse_json
from .completions import completed
from .protocol import CompletionRequest, read_request
from .refusal import Refusal
from .service import Service

PAGE = Path(__file__).parent / "page"
HEADERS = {
    "content-security-policy": "default-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; object-src 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}


class Secured:
    """Adds headers to every answer that keep a browser from more than the page needs."""

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer."""

        async def sent(message: Any) -> None:
            if message["type"] == "http.response.start":
                more = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message = {**message, "headers": [*message.get("headers", []), *more]}
            await send(message)

        await self.app(scope, receive, sent)


class Stream(Response):
    """Events, until the client is gone."""

    def __init__(self, answers: Any, chunks: AsyncIterator[dict[str, Any]]):
        super().__init__(media_type="text/event-stream", headers={"cache-control": "no-store"})
        self.answers, self.chunks = answers, chunks
        self.raw_headers = [h for h in self.raw_headers if h[0] != b"content-length"]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send them."""
        writing = asyncio.ensure_future(self._write(send))
        leaving = asyncio.ensure_future(gone_away(receive))
        try:
            await asyncio.wait([writing, leaving], return_when=asyncio.FIRST_COMPLETED)
        finally:
            leaving.cancel()
            writing.cancel()
            self.answers.cancel()
        if writing.done() and not writing.cancelled():
            writing.result()

    async def _write(self, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async for chunk in self.chunks:
                await self._event(send, chunk)
        except Refusal as refusal:
            await self._event(send, refusal.body())
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    async def _event(self, send: Any, value: dict[str, Any]) -> None:
        body = f"data: {json.dumps(value, ensure_ascii=False)}\n\n".encode()
        await send({"type": "http.response.body", "body": body, "more_body": True})


async def gone_away(receive: Any) -> None:
    """Wait until the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


def create_app(service: Service) -> FastAPI:
    """The application."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.engine.close)

    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, lifespan=lifespan)
    app.add_middleware(Secured)

    @app.exception_handler(Refusal)
    async def refuse(_: Request, refusal: Refusal) -> Response:
        return JSONResponse(refusal.body(), refusal.status, refusal.headers)

    @app.get("/v1/models")
    async def models() -> Any:
        about = {"id": service.name, "object": "model", "created": 0, "owned_by": "ar2diff"}
        return {"object": "list", "data": [{**about, "ar2diff": service.described()}]}

    @app.get("/health")
    async def health() -> Any:
        if service.engine.alive:
            return {"status": "ok"}
        return JSONResponse({"status": "the engine has stopped"}, 503)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Any:
        try:
            value = parse_json(await request.body(), constants=False)
        except ValueError as error:
            raise Refusal(400, f"the body is not JSON: {error}") from None
        asked = read_request(CompletionRequest, value)
        found = await completed(service, asked)
        if asked.stream:
            return Stream(found.answers, found.chunks())
        waiting = asyncio.ensure_future(found.whole())
        leaving = asyncio.ensure_future(gone_away(request.receive))
        try:
            await asyncio.wait([waiting, leaving], return_when=asyncio.FIRST_COMPLETED)
            return waiting.result() if waiting.done() else Response(status_code=499)
        finally:
            waiting.cancel()
            leaving.cancel()
            found.answers.cancel()

    app.mount("/", StaticFiles(directory=PAGE, html=True))
    return app
