"""Calls that may take so long and no longer."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

AGAIN = 1.0  # seconds until a call that ate its alarm gets another


class TimedOut(Exception):
    """A call took longer than it may."""


class _Alarm(BaseException):
    """Ends a call from within; no Exception, which code like a reward's often catches."""


def call_within(seconds: float, function: Callable[[], Any]) -> Any:
    """What the function returns or raises; calls may be nested.

    In the main thread an alarm interrupts it, though not in the midst of compiled code that looks
    for none. In other threads, and where there are no alarms, it runs in a thread of its own, which
    is left behind.

    Raises:
        TimedOut: it took longer.
    """
    in_main = threading.current_thread() is threading.main_thread()
    # None: a handler not set from Python, which could not be put back
    if in_main and hasattr(signal, "setitimer") and signal.getsignal(signal.SIGALRM) is not None:
        return _interrupted(seconds, function)
    return _in_thread(seconds, function)


def _interrupted(seconds: float, function: Callable[[], Any]) -> Any:
    alarm, fired = _Alarm(), False
    earlier = signal.getsignal(signal.SIGALRM)
    began = time.monotonic()

    def expire(number: int, frame: Any) -> None:
        nonlocal fired, left
        if time.monotonic() - began >= seconds:
            fired = True
            raise alarm
        if left and callable(earlier):  # the time of a timer around this one is up
            left = 0.0
            earlier(number, frame)

    left, interval = signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, min(left or seconds, seconds), AGAIN)
    try:
        value = function()
    except _Alarm as error:
        if error is not alarm:
            raise
        raise TimedOut from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, earlier)
        if left:
            left = max(left - (time.monotonic() - began), 1e-3)
            signal.setitimer(signal.ITIMER_REAL, left, interval)
    if fired:  # a bare except ate the alarm
        raise TimedOut
    return value


def _in_thread(seconds: float, function: Callable[[], Any]) -> Any:
    outcome: list[tuple[Any, BaseException | None]] = []

    def work() -> None:
        try:
            outcome.append((function(), None))
        except BaseException as error:  # the caller's to raise
            outcome.append((None, error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise TimedOut
    value, error = outcome[0]
    if error is not None:
        raise error
    return value


class LoopThread:
    """An event loop in a thread of its own, begun at the first call and kept.

    It is one loop for all calls, since clients of a network belong to a loop. And it is not the
    caller's, since a function that blocks its loop could not be ended there.
    """

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None

    async def call_within(self, seconds: float, function: Callable[[], Awaitable[Any]]) -> Any:
        """As `call_within`, for an async function."""
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=self._loop.run_forever, daemon=True).start()
        future = asyncio.run_coroutine_threadsafe(_outcome(function), self._loop)
        try:
            value, error = await asyncio.wait_for(asyncio.wrap_future(future), seconds)
        except TimeoutError:
            raise TimedOut from None
        if error is not None:
            raise error
        return value


async def _outcome(
    function: Callable[[], Awaitable[Any]],
) -> tuple[Any, BaseException | None]:
    """The outcome as a value: an exit that left the coroutine would end the loop unheard."""
    try:
        return await function(), None
    except asyncio.CancelledError:
        raise
    except BaseException as error:
        return None, error
