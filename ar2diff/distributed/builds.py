"""Checks for code that is compiled on first use. A DeepSpeed build that is killed leaves a lock
behind, and torch would make every later run wait for it silently and forever."""

from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path

from ..core.errors import Ar2DiffError, option

OPERATORS = ("deepspeed_shm_comm", "cpu_adam")  # communication on CPUs; offloaded optimizers
STALE = 300  # seconds; a build takes a minute or two, and may run on a node that we cannot see


def check_compiler() -> None:
    """Refuse torch.compile on a machine that has no compiler.

    Raises:
        Ar2DiffError: it has neither a GPU nor a C++ compiler.
    """
    import torch

    compiler = os.environ.get("CXX", "g++")
    if not torch.cuda.is_available() and shutil.which(compiler) is None:
        raise Ar2DiffError(
            f"{option('train.compile')} on a CPU needs {compiler}, which is not on PATH",
            f"install it, name another compiler in CXX, or leave {option('train.compile')} out",
        )


def check_locks() -> None:
    """Refuse to start a run that would wait for a build that no process is working on.

    Raises:
        Ar2DiffError: naming the lock.
    """
    for lock in _locks():
        said = False
        while (age := _age(lock)) is not None and not _is_held(lock):
            if age >= STALE:
                raise Ar2DiffError(
                    f"{lock} was left behind by a DeepSpeed build that was killed; every run would "
                    "wait for it",
                    f"remove it with: rm {lock}",
                )
            if not said:
                print(f"waiting up to {STALE} s for the process that holds {lock}", file=sys.stderr)
            said = True
            time.sleep(1)


def _locks() -> list[Path]:
    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    if root is None:
        from torch.utils.cpp_extension import get_default_build_root

        root = get_default_build_root()
    return sorted(lock for name in OPERATORS for lock in Path(root).glob(f"**/{name}/lock"))


def _age(lock: Path) -> float | None:
    try:
        return time.time() - lock.stat().st_mtime
    except FileNotFoundError:  # the build has finished
        return None


def _is_held(lock: Path) -> bool:
    """Whether a process on this machine has the file open, as torch does while it builds. This
    works only on Linux; elsewhere, and for other nodes, only the age of the lock can tell."""
    path = str(lock.resolve())
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if str(descriptor.readlink()) == path:
                return True
        except OSError:  # the process has ended, or belongs to another user
            continue
    return False
