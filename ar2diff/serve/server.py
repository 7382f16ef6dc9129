"""Running a server: loading the model, the engine's thread, signals."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path
from typing import Any

import uvicorn

from ..generation.complete import load
from .app import create_app
from .engine import Engine
from .limits import Limits
from .service import Service


class Server(uvicorn.Server):
    """A server that leaves signals to `serve`."""

    def capture_signals(self) -> Any:
        """Capture none."""
        from contextlib import nullcontext

        return nullcontext()


def serve(
    model: str,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    dtype: str = "auto",
    name: str | None = None,
    max_batch: int = 32,
    max_waiting: int = 256,
) -> None:
    """Serve a model until a signal ends it."""
    checkpoint = load(model, dtype)
    engine = Engine(checkpoint, max_batch=max_batch, max_waiting=max_waiting)
    engine.start()
    service = Service(checkpoint, engine, name or Path(model).name, Limits())
    config = uvicorn.Config(
        create_app(service),
        host=host,
        port=port,
        http="h11",
        ws="none",
        loop="asyncio",
        log_config=None,
        access_log=False,
        server_header=False,
    )
    asyncio.run(_run(Server(config)))


async def _run(server: Server) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, setattr, server, "should_exit", True)
    await server.serve()
