"""Building the extension behind `fakedev`, once for each version of PyTorch and of the source."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("device.cpp")
NAME = "ar2diff_fakedev"
COMPILER = "g++"


def missing() -> str | None:
    """Why the extension cannot be built here; None if it can."""
    if shutil.which(COMPILER) is None:
        return f"{COMPILER} is not installed, and the pretended accelerator is built with it"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
        return "Python.h is not installed, and the pretended accelerator is built with it"
    return None


def extension() -> Path:
    """The built extension, in the user's cache directory; about a quarter of a minute the first
    time. Processes that build it at the same time do not disturb each other.

    Raises:
        RuntimeError: the compiler refuses, in its own words.
    """
    key = hashlib.sha256(
        b"\0".join([SOURCE.read_bytes(), torch.__version__.encode(), sys.version.encode()])
    ).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    target = cache / "ar2diff-tests" / f"{NAME}-{key}.so"
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            built = Path(folder) / target.name
            _compile(built)
            built.replace(target)
    return target


def _compile(target: Path) -> None:
    root = Path(torch.__file__).parent
    abi = int(torch.compiled_with_cxx11_abi())
    command = [
        COMPILER, "-std=c++20", "-O0", "-fPIC", "-shared", f"-D_GLIBCXX_USE_CXX11_ABI={abi}",
        f"-DEXTENSION={NAME}", f"-I{root / 'include'}",
        f"-I{root / 'include/torch/csrc/api/include'}", f"-I{sysconfig.get_paths()['include']}",
        str(SOURCE), "-o", str(target), f"-L{root / 'lib'}", "-lc10", "-ltorch_cpu",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{COMPILER} cannot build {SOURCE.name}:\n{done.stderr[-2000:]}")
