"""Running a server: a model, its engine, a socket, and signals."""

from __future__ import annotations

import asyncio
import importlib.util
import ipaddress
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import Ar2DiffError, option, shortened

if TYPE_CHECKING:
    from .service import Service

PACKAGES = ("fastapi", "uvicorn", "prometheus_client")  # of the extra
SIGNALS = (signal.SIGTERM, signal.SIGINT)
SWITCH = 0.0003  # seconds after which a thread lets another one run; five thousandths by default


def serve(
    model: str,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key_file: Path | None = None,
    model_name: str | None = None,
    dtype: str = "auto",
    max_batch: int = 32,
    max_waiting: int = 256,
    max_tokens: int = 4096,
    time_limit: float = 600.0,
    prefix_cache: int = 256,
    settings: dict[str, Any] | None = None,
    ready: Callable[[str], None] = print,
) -> None:
    """Serve a model until SIGTERM or SIGINT; answers that were begun are finished before it
    returns.

    Args:
        model: folder or Hub id.
        host: where to listen; beyond this machine, clients need a key.
        port: 0 takes one that is free.
        api_key_file: with the keys that clients may use, one a line.
        model_name: under which clients know the model; None: the last part of `model`.
        dtype: number type to compute in.
        max_batch: answers that are written together. max_waiting: that may wait for a place.
        max_tokens: of an answer. time_limit: seconds that a request may take.
        prefix_cache: megabytes of beginnings of prompts to keep.
        settings: options of `generate` that hold where a request does not set them.
        ready: called with a line that says where the server listens.

    Raises:
        Ar2DiffError: an option is wrong, the model does not load, or the port is taken.
    """
    check_installed()
    from ..generation.complete import check_request
    from .log import log_to_stderr

    settings = settings or {}
    keys = read_keys(api_key_file) if api_key_file is not None else []
    listener = listen(host, port, bool(keys))
    with listener:
        check_request(model, None, settings)
        service = _service(
            model, model_name, dtype, settings, max_batch, max_waiting, max_tokens, time_limit,
            prefix_cache,
        )  # fmt: skip
        log_to_stderr()
        asyncio.run(_run(service, keys, listener, host, ready))


def check_installed() -> None:
    """Refuse to serve if a library is missing.

    Raises:
        Ar2DiffError: it names the extra.
    """
    for name in PACKAGES:
        if importlib.util.find_spec(name) is None:
            raise Ar2DiffError(
                f"serving needs {name.replace('_', '-')}, which is not installed",
                "install it with: pip install 'ar2diff[serve]'",
            )


def read_keys(path: Path) -> list[str]:
    """The keys in a file, one a line.

    Raises:
        Ar2DiffError: it cannot be read, or has none.
    """
    name = f"{option('api_key_file')} {path}"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        told = getattr(error, "strerror", None) or "it is not text"
        raise Ar2DiffError(f"{name} cannot be read: {told}", "check the path") from None
    keys = [line.strip() for line in lines if line.strip()]
    if not keys:
        raise Ar2DiffError(f"{name} has no key", "write one on each line")
    return keys


def listen(host: str, port: int, has_keys: bool) -> socket.socket:
    """A socket that is bound, and accepts nothing yet.

    Raises:
        Ar2DiffError: the host is not known, is not this machine and there are no keys, or the port
            is taken.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError):
        raise Ar2DiffError(
            f"{option('host')} {shortened(host)} is not known",
            f"use an address of this machine, for example {option('host', '127.0.0.1')}",
        ) from None
    family, kind, protocol, _, address = found[0]
    if not has_keys and not all(_is_loopback(entry[4][0]) for entry in found):
        raise Ar2DiffError(
            f"{option('host', host)} lets other machines in, and there is no key",
            f"set {option('api_key_file')} to a file with a key, or leave out {option('host')}",
        )
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise Ar2DiffError(
            f"{option('port', port)} of {host} cannot be used: {error.strerror}",
            f"choose another one, or {option('port', 0)} for any that is free",
        ) from None
    return listener


def _is_loopback(address: Any) -> bool:
    return ipaddress.ip_address(str(address).partition("%")[0]).is_loopback


def _service(
    model: str,
    name: str | None,
    dtype: str,
    settings: dict[str, Any],
    max_batch: int,
    max_waiting: int,
    max_tokens: int,
    time_limit: float,
    prefix_cache: int,
) -> Service:
    """The model, loaded, and its engine, started."""
    from ..generation.complete import load
    from .engine import Engine
    from .limits import SEEING, Limits
    from .service import Service, set_defaults

    checkpoint = load(model, dtype)
    set_defaults(checkpoint, settings)
    engine = Engine(
        checkpoint, max_batch=max_batch, max_waiting=max_waiting, prefix_bytes=prefix_cache << 20
    )
    limits = Limits(
        tokens=max_tokens, seconds=time_limit, rows=min(Limits.rows, max_waiting),
        body=SEEING if checkpoint.sees_images else Limits.body,
    )  # fmt: skip
    service = Service(checkpoint, engine, name or Path(model).name or model, limits)
    if checkpoint.sees_images:
        service.processor  # noqa: B018 - whatever it lacks is told now
    service.metrics.watch(engine)
    engine.warm(service.base)
    # The engine's thread lets others run at every operation on tensors, and has to be let in again.
    sys.setswitchinterval(SWITCH)
    engine.start()
    return service


async def _run(
    service: Service,
    keys: list[str],
    listener: socket.socket,
    host: str,
    ready: Callable[[str], None],
) -> None:
    from .log import LOG

    server, loop = http_server(service, keys, host), asyncio.get_running_loop()
    for number in SIGNALS:
        loop.add_signal_handler(number, _leave, server)
    address = listener.getsockname()
    shown = f"[{address[0]}]" if ":" in address[0] else address[0]
    url = f"http://{shown}:{address[1]}"
    ready(f"serving {service.name} at {url} (OpenAI's interface: {url}/v1; a page: {url}/)")
    LOG.info("ready", extra={"told": {"url": url, "model": service.name}})
    await server.serve([listener])
    LOG.info("closed")
    await asyncio.to_thread(service.engine.close, not server.force_exit)
    if server.force_exit:
        raise KeyboardInterrupt


def http_server(service: Service, keys: Sequence[str] = (), host: str = "127.0.0.1") -> Any:
    """A server of uvicorn, which leaves signals to its caller.

    Args:
        keys: that clients may use; none: they need none.
        host: a name under which it may be asked, besides those of the loopback.
    """
    import uvicorn

    from .app import create_app
    from .connections import Connection
    from .gate import LOOPBACK

    class Server(uvicorn.Server):
        def capture_signals(self) -> Any:
            return nullcontext()

    limits = service.limits
    config = uvicorn.Config(
        create_app(service, keys, {*LOOPBACK, host}),
        http=type("Timed", (Connection,), {"headers_within": limits.headers}),
        ws="none", lifespan="off", log_config=None, access_log=False, server_header=False,
        timeout_graceful_shutdown=int(limits.seconds + limits.leave),
    )  # fmt: skip
    return Server(config)


def _leave(server: Any) -> None:
    """Finish what was begun; asked again, leave at once."""
    server.force_exit = server.should_exit
    server.should_exit = True
