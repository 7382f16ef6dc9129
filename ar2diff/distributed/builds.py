"""What is compiled when it is first used. A build by DeepSpeed that is killed leaves a lock, for
which torch would have every later run wait without an end and without a word."""

from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path

from ..core.errors import Ar2DiffError

OPERATORS = ("deepspeed_shm_comm", "cpu_adam")  # communication on CPUs; offloaded optimizers
STALE = 300  # seconds; a build takes one or two minutes, on another node unseen by us


def check_compiler() -> None:
    """Refuse torch.compile on a machine that cannot compile.

    Raises:
        Ar2DiffError: CPUs alone, and no C++ compiler.
    """
    import torch

    compiler = os.environ.get("CXX", "g++")
    if not torch.cuda.is_available() and shutil.which(compiler) is None:
        raise Ar2DiffError(
            f"train.compile: torch compiles for CPUs with {compiler}, which is not on PATH",
            "install it, name another in CXX, or leave train.compile out",
        )


def check_locks() -> None:
    """Refuse to start where a run would wait for a build that nobody makes.

    Raises:
        Ar2DiffError: naming the lock.
    """
    for lock in _locks():
        said = False
        while (age := _age(lock)) is not None and not _is_held(lock):
            if age >= STALE:
                raise Ar2DiffError(
                    f"{lock} is left of a DeepSpeed build that was killed; every run waits for it",
                    "remove that file",
                )
            if not said:
                print(f"waiting up to {STALE} s for whoever holds {lock}", file=sys.stderr)
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
    except FileNotFoundError:  # the build is done
        return None


def _is_held(lock: Path) -> bool:
    """Whether a process of this machine has the file open, as torch does while it builds (Linux;
    elsewhere, and on other nodes, the age has to tell)."""
    path = str(lock.resolve())
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if str(descriptor.readlink()) == path:
                return True
        except OSError:  # it has ended, or is another user's
            continue
    return False
