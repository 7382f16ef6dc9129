"""Calling functions in a process of their own, which is killed if a call takes too long.

A process cannot reliably interrupt its own code: a backtracking regex does not check for signals,
and `except BaseException` catches whatever is raised into it. So a `Worker` forks a server while
this process is small and has no busy threads. The server forks the worker that is called, and a new
one after each kill, without importing anything again.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import functools
import inspect
import json
import os
import pickle
import resource
import signal
import socket
import struct
import sys
import time
import traceback
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..core.errors import Ar2DiffError, first_line
from ..distributed.ranks import die_with_parent

MEMORY = 2 << 30  # bytes that a confined worker may add to its initial memory
NUMBER = struct.Struct("!Q")
CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000


@dataclass(frozen=True)
class Raised:
    """An exception that a function raised: its class, the first line of its message, and the
    place."""

    kind: str
    message: str
    place: str


@dataclass(frozen=True)
class Stopped:
    """A call without a result: the worker was killed for taking too long, or it exited."""

    why: str


@dataclass
class _Processes:
    """A server, its worker if there is one, and the sockets to both."""

    control: socket.socket
    server: int
    calls: socket.socket | None = None
    worker: int = 0
    owner: int = field(default_factory=os.getpid)

    def end_worker(self) -> None:
        """Kill the worker and whatever it has started."""
        if self.calls is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.worker, signal.SIGKILL)
            self.calls.close()
            self.calls = None

    def end(self) -> None:
        """Kill both. Must not be called in a forked process that inherited this object."""
        if self.owner == os.getpid():
            self.end_worker()
            self.control.close()
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(self.server, signal.SIGKILL)
                os.waitpid(self.server, 0)


class Worker:
    """A process that calls a function.

    Args:
        function: a sync or async function, called with keyword arguments. Its result must be
            JSON; the values of a generator arrive one by one.
        prepare: called once in each process before it calls the function, for example `confine`.
    """

    def __init__(self, function: Callable[..., Any], prepare: Callable[[], None] = lambda: None):
        if not hasattr(os, "fork"):
            raise Ar2DiffError(
                "rewards run in forked processes, which this operating system does not support",
                "run rl on Linux, macOS or WSL",
            )
        control, theirs = socket.socketpair()
        sys.stdout.flush()
        sys.stderr.flush()
        with warnings.catch_warnings():  # warns of threads, which the server does not need
            warnings.simplefilter("ignore", DeprecationWarning)
            server = os.fork()
        if not server:
            control.close()
            _run(lambda: _serve(theirs, function, prepare))
        theirs.close()
        self._processes = _Processes(control, server)
        weakref.finalize(self, self._processes.end)

    def call(self, seconds: float, passed: dict[str, Any]) -> Any:
        """The result of the function, or `Raised` or `Stopped` if there is none.

        Args:
            seconds: how long the call may take. passed: keyword arguments, which must be picklable.

        Raises:
            Ar2DiffError: the function raised it.
        """
        return list(self.values(seconds, passed))[-1]

    def values(self, seconds: float, passed: dict[str, Any]) -> Iterator[Any]:
        """The values of a function that returns a generator. Each may take `seconds`; `Raised` or
        `Stopped` comes last."""
        state = self._processes
        try:
            if state.calls is None:
                self._start()
            _send(state.calls, pickle.dumps(passed))
            while True:
                # JSON, because data from a process that may run foreign code must not be unpickled.
                kind, value = json.loads(_message(state.calls, time.monotonic() + seconds))
                if kind == "error":
                    raise Ar2DiffError(*value)
                if kind == "raised":
                    value = Raised(*value)
                if kind != "end":
                    yield value
                if kind != "next":
                    return
        except (TimeoutError, EOFError, ConnectionError) as error:
            late = isinstance(error, TimeoutError)
            state.end_worker()
            yield Stopped(f"took longer than {seconds:g} seconds" if late else "exited")
        except Ar2DiffError:
            raise
        except BaseException:  # an interrupt, or the caller wants no more values
            state.end_worker()
            raise

    def _start(self) -> None:
        state, (ours, theirs) = self._processes, socket.socketpair()
        with theirs:
            socket.send_fds(state.control, [b"f"], [theirs.fileno()])
        state.worker = NUMBER.unpack(_exactly(state.control, NUMBER.size))[0]
        state.calls = ours


def confine() -> None:
    """Take away what a function does not need that scores what a model wrote: this process can no
    longer write files or use the network, and its memory is limited."""
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(ValueError, OSError):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    if sys.platform.startswith("linux"):  # move to an empty network namespace, if allowed
        ctypes.CDLL(None).unshare(CLONE_NEWUSER | CLONE_NEWNET)


def _run(function: Callable[[], None]) -> None:
    """The whole life of a forked process, which never returns into the code that forked it."""
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interrupt does
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        function()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(0)


def _serve(
    control: socket.socket, function: Callable[..., Any], prepare: Callable[[], None]
) -> None:
    """Fork a worker for each socket that arrives, until the other end is closed."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the workers
    while True:
        message, sockets, _, _ = socket.recv_fds(control, 1, 1)
        if not message:
            return
        process = os.fork()
        if not process:
            control.close()
            calls = socket.socket(fileno=sockets[0])
            _run(functools.partial(_work, calls, function, prepare))
        os.close(sockets[0])
        with contextlib.suppress(PermissionError, ProcessLookupError):
            os.setpgid(process, process)  # in both processes, since either may come first
        control.sendall(NUMBER.pack(process))


def _work(calls: socket.socket, function: Callable[..., Any], prepare: Callable[[], None]) -> None:
    """Answer calls until the other end is closed."""
    die_with_parent()
    with contextlib.suppress(PermissionError):
        os.setpgid(0, 0)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)  # thread pools do not survive a fork
    prepare()
    loop = asyncio.new_event_loop()  # one for all calls: network clients are tied to a loop
    while True:
        try:
            passed = pickle.loads(_message(calls))
        except EOFError:
            return
        _answer(calls, function, passed, loop)


def _answer(
    calls: socket.socket, function: Callable[..., Any], passed: dict[str, Any], loop: Any
) -> None:
    try:
        value = function(**passed)
        if inspect.isawaitable(value):
            value = loop.run_until_complete(value)
        if inspect.isgenerator(value):
            for part in value:
                _send(calls, json.dumps(("next", part)).encode())
            answer = json.dumps(("end", None))
        else:
            answer = json.dumps(("value", value))
    except Ar2DiffError as error:
        answer = json.dumps(("error", error.__reduce__()[1]))
    except BaseException as error:  # even SystemExit: the function failed, but the run goes on
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(frame.filename).name}, line {frame.lineno}"
        answer = json.dumps(("raised", (type(error).__name__, first_line(error), place)))
    _send(calls, answer.encode())


def _send(to: socket.socket, data: bytes) -> None:
    to.sendall(NUMBER.pack(len(data)) + data)


def _message(source: socket.socket, until: float | None = None) -> bytes:
    return _exactly(source, NUMBER.unpack(_exactly(source, NUMBER.size, until))[0], until)


def _exactly(source: socket.socket, size: int, until: float | None = None) -> bytes:
    """Receive exactly `size` bytes.

    Raises:
        TimeoutError: they do not arrive in time. EOFError: the other end is closed.
    """
    data = bytearray()
    while len(data) < size:
        left = None if until is None else until - time.monotonic()
        if left is not None and left <= 0:
            raise TimeoutError
        source.settimeout(left)
        part = source.recv(min(size - len(data), 1 << 20))
        if not part:
            raise EOFError
        data += part
    source.settimeout(None)
    return bytes(data)
