"""SIGKILL in forked children of a process that has imported everything. A moment is a number of
calls of functions or a step that is told, so it does not depend on the speed of the machine."""

from __future__ import annotations

import os
import random
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
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


def killed_at_step(work: Callable[[], Any], step: int, saves: Path | None = None) -> None:
    """Run a training verb in a forked child and kill it once it has told of a step.

    Args:
        saves: its run folder: kill it at the next moment at which it writes a checkpoint there.
    """
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.dup2(write, 2)
            sys.stderr = os.fdopen(2, "w", buffering=1)
            torch.set_num_threads(1)  # a pool of the parent's has no threads here
            work()
        finally:
            os._exit(1)
    os.close(write)
    with os.fdopen(read) as told:
        for line in told:
            if (said := re.match(r"step (\d+)/", line)) and int(said[1]) >= step:
                break
        while saves and not (saves / ".partial").exists() and not os.waitpid(pid, os.WNOHANG)[0]:
            time.sleep(0.001)
        os.kill(pid, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(pid, 0)[1]), "the work ended before it was to be killed"
