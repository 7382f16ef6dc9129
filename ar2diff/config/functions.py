"""Functions that users write, by name: rewards and guides."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from ..core.errors import Ar2DiffError, first_line, nearest


def function_of(name: str, kind: str) -> Callable[..., Any]:
    """The function `module:function` (the current folder is searched too) or
    `path/to/file.py:function`. Its code runs in this process.

    Args:
        kind: what it is for, as errors say it.

    Raises:
        Ar2DiffError: it cannot be found or imported, or is not a function.
    """
    source, _, path = name.rpartition(":")
    if not (source and path):
        raise Ar2DiffError(
            f"{kind} {name!r} names no function", "write module:function or file.py:function"
        )
    own = f"{kind} {name!r}"
    function: Any = _file(source, own) if source.endswith(".py") else _module(source, own)
    for part in path.split("."):
        inside = [name for name in dir(function) if not name.startswith("_")]
        function = getattr(function, part, None)
        if function is None:
            raise Ar2DiffError(
                f"{own}: {source} has no {path!r}",
                near(part, inside, f"it has {', '.join(inside[:8]) or 'nothing'}"),
            )
    if not callable(function):
        raise Ar2DiffError(
            f"{own} is not a function but of type {type(function).__name__}", "name a function"
        )
    return function


def near(name: str, names: Sequence[str], otherwise: str) -> str:
    """A fix: the nearest of the names, or else `otherwise`."""
    return nearest(name, names).removeprefix("; ") or otherwise


def _module(name: str, own: str) -> ModuleType:
    _on_path(Path.cwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise _not_imported(own, error) from error
        raise Ar2DiffError(
            f"{own}: there is no module {name!r}",
            "install it, run ar2diff from its folder, or write path/to/file.py:function",
        ) from None
    except Exception as error:
        raise _not_imported(own, error) from error


def _file(name: str, own: str) -> ModuleType:
    path = Path(name).expanduser().resolve()
    if not path.is_file():
        raise Ar2DiffError(f"{own}: there is no file {name}", "correct the path")
    _on_path(path.parent)  # so that it can import its neighbours, like a script
    key = f"{path.stem}_{zlib.crc32(str(path).encode()):08x}"  # cannot shadow a module of this name
    if key not in sys.modules:
        spec = importlib.util.spec_from_file_location(key, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[key] = module  # dataclasses and pickle look it up there
        try:
            spec.loader.exec_module(module)
        except BaseException as error:
            del sys.modules[key]
            if isinstance(error, Exception):
                raise _not_imported(own, error) from error
            raise
    return sys.modules[key]


def _on_path(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def _not_imported(own: str, error: Exception) -> Ar2DiffError:
    return Ar2DiffError(
        f"{own} cannot be imported: {type(error).__name__}: {first_line(error)}",
        "correct the module; 'python -m pdb FILE' shows where it fails",
    )
