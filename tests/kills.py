"""SIGKILL at random moments, in forked children of a process that has imported everything. A moment
is a number of calls of functions, so it does not depend on the speed of the machine."""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from tqdm.std import TqdmDefaultWriteLock


def in_a_child(work: Callable[[], Any], kill: int | None = None, mark: str = "") -> tuple[int, int]:
    """Run `work` in a forked child, which ends without cleaning up.

    Args:
        kill: end the child by SIGKILL at this call.
        mark: name of a function.

    Returns:
        Calls of the whole work, and those before `mark` is called for the first time; of a child
        that was killed (0, 0).
    """
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        calls, marked = 0, 0

        def profile(frame: Any, event: str, _: Any) -> None:
            nonlocal calls, marked
            calls += event in ("call", "c_call")
            if calls == kill:
                os.kill(os.getpid(), signal.SIGKILL)
            if event == "call" and not marked and frame.f_code.co_name == mark:
                marked = calls

        try:
            # Shared with the parent, which would wait for it after a kill.
            TqdmDefaultWriteLock.acquire = TqdmDefaultWriteLock.release = lambda *_, **__: None
            threading.setprofile(profile)
            sys.setprofile(profile)
            work()
            sys.setprofile(None)
            os.write(write, f"{calls} {marked}".encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as answer:
        said = answer.read()
    killed = os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    assert killed or said, "the work failed"
    calls, marked = map(int, said.split()) if said else (0, 0)
    return calls, marked


def moments(calls: int, marked: int, count: int = 20, seed: int = 0) -> Iterator[int]:
    """Random moments of some work, half of them after the call of a function that was marked.

    Args:
        calls, marked: of `in_a_child`.
    """
    assert marked
    rng = random.Random(seed)
    for number in range(count):
        yield rng.randint(marked if number % 2 else 1, calls)
