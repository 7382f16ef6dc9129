"""Being one process among several: detecting it, reporting errors, and exiting."""

from __future__ import annotations

import atexit
import json
import os
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..core.errors import Ar2DiffError, option

CHOSEN = "AR2DIFF_LAUNCH"  # the strategy or file that a process was launched with
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"  # where a process tells the launcher what went wrong
STOPPED = 128 + signal.SIGTERM  # exit code of a run that was told to stop


def search_path() -> str:
    """PATH, plus the folder of this Python, where pip puts tools that libraries look for."""
    return os.pathsep.join([os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)])


def chosen() -> str | None:
    """The strategy or file that this process was launched with; None if it was not launched."""
    return os.environ.get(CHOSEN) if ERROR_FILE in os.environ else None


def is_launched() -> bool:
    """Whether this process is one of those that `Launch.run` started."""
    return chosen() is not None


def report_error(error: BaseException, text: str) -> None:
    """Hand the error to the launcher, which prints one report for all processes."""
    data: dict[str, Any] = {"message": text, "timestamp": str(int(time.time()))}
    if isinstance(error, Ar2DiffError):
        data |= {"what": error.what, "fix": error.fix}
    Path(os.environ[ERROR_FILE]).write_text(json.dumps(data))


@contextmanager
def at_work() -> Iterator[None]:
    """A context for the work of a command. A launched process dies with its launcher, keeps the
    output of libraries off stdout, which is for results, and closes its connections at the end."""
    if not is_launched():
        yield
        return
    die_with_parent()
    os.environ["PATH"] = search_path()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
        _disconnect()
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


@contextmanager
def ending() -> Iterator[None]:
    """A context for a whole command, entered before anything heavy is imported. One process among
    several, under whatever launcher, exits once its exit handlers have run and skips Python's
    finalization, during which a gloo thread that still has to free the tensors of a collective
    would be refused the GIL and abort a process that had done all its work (pytorch #179291)."""
    if "RANK" not in os.environ:
        yield
        return
    code = 1

    def leave() -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    atexit.register(leave)  # registered first, so it runs last
    try:
        yield
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        raise


def _disconnect() -> None:
    import torch.distributed

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def die_with_parent() -> None:
    """Ask Linux to kill this process when its parent dies: an orphan would keep writing alongside a
    resumed run."""
    if not sys.platform.startswith("linux"):
        return
    import ctypes

    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() == 1:  # the parent died before we asked
        os.kill(os.getpid(), signal.SIGKILL)


def world_size() -> int:
    """The number of processes on all nodes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process does the reporting and writing for all of them."""
    return os.environ.get("RANK", "0") == "0"


def check_rows(rows: int, processes: int | None = None) -> None:
    """Refuse more processes than rows of data.

    Args:
        rows: 0 if the number is not known.
        processes: None for the number that are running.
    """
    processes = processes or world_size()
    if 0 < rows < processes:
        raise Ar2DiffError(
            f"there are {processes} processes, but the data has only {rows} rows",
            f"set {option('num_processes', rows)} or lower, or use more data",
        )
