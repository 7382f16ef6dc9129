"""Rewards of a recipe: found by their names, and guarded, as trl calls them."""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.util
import inspect
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import ConfigDict, ValidationError, create_model

from ..config.rl import Reward
from ..core.errors import Ar2DiffError, first_line
from .builtin import GRADERS
from .guards import Guard, text_of
from .timeouts import LoopThread, call_within

MODEL = "model:"  # before the folder or Hub id of a reward model
PASSED = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")


def make_rewards(entries: Sequence[Reward]) -> list[Callable[..., Any] | str]:
    """What trl takes as `reward_funcs`, in the order of the entries.

    An entry's name is one of ours (`graders.GRADERS`), `module:function` (from the current
    directory too), `path/to/file.py:function`, or `model:PATH`. A function, sync or async, is
    called as `function(prompts=, completions=, **columns, **args)` and returns a number, or None
    for "does not apply", for each completion. Each is wrapped, and checked at every call; its
    `__name__` is its own. A model's path is returned as it is: trl loads it.

    Raises:
        Ar2DiffError: a reward is not to be found, or does not fit. The functions raise it when a
            reward raises, takes longer than `time_limit`, or returns anything else. That all of a
            batch is None is allowed only beside other rewards.
    """
    taken: set[str] = set()
    made: list[Callable[..., Any] | str] = []
    for entry in entries:
        if entry.name.startswith(MODEL):
            made.append(_model(entry))
            continue
        guard = functools.partial(Guard, limit=entry.time_limit, alone=len(entries) == 1)
        if entry.name in GRADERS:
            made.append(_graded(entry, guard(_unique(entry.name, taken))))
        else:
            function, name = _own(entry)
            made.append(_guarded(function, entry, guard(_unique(name, taken))))
    return made


def _unique(name: str, taken: set[str]) -> str:
    """The name, or name_2, name_3 ...: trl logs by it."""
    numbers = iter(range(2, len(taken) + 3))
    free = name
    while free in taken:
        free = f"{name}_{next(numbers)}"
    taken.add(free)
    return free


def _near(name: str, names: Sequence[str], otherwise: str) -> str:
    near = difflib.get_close_matches(name, names, 1)
    return f"did you mean {near[0]!r}?" if near else otherwise


def _model(entry: Reward) -> str:
    path = entry.name.removeprefix(MODEL)
    if entry.args:
        raise Ar2DiffError(f"reward {entry.name!r}: a reward model takes no args", "remove them")
    folder = Path(path).expanduser()
    if path and (folder / "config.json").is_file():
        return str(folder)
    is_id = path and not folder.exists() and path.count("/") < 2 and path[0] not in "./~"
    if not is_id:
        raise Ar2DiffError(
            f"reward {entry.name!r}: there is no model at {path!r}",
            "name the folder or the Hub id of a sequence classifier",
        )
    return path


def _own(entry: Reward) -> tuple[Callable[..., Any], str]:
    """A function that the user wrote, and its name."""
    source, _, path = entry.name.rpartition(":")
    if not (source and path):
        raise _nameless(entry.name)
    module = _file(source, entry) if source.endswith(".py") else _module(source, entry)
    function: Any = module
    for part in path.split("."):
        inside = [name for name in dir(function) if not name.startswith("_")]
        function = getattr(function, part, None)
        if function is None:
            raise Ar2DiffError(
                f"reward {entry.name!r}: {source} has no {path!r}",
                _near(part, inside, f"it has {', '.join(inside[:8]) or 'nothing'}"),
            )
    _check_callable(function, entry)
    return function, part


def _nameless(name: str) -> Ar2DiffError:
    """What is wrong with a name that is neither one of ours nor source:function."""
    source = name.strip(":")
    if source.endswith(".py") or (source and name.endswith(":")):
        return Ar2DiffError(f"reward {name!r} names no function", f"write {source}:FUNCTION")
    yours = f"ours are {', '.join(GRADERS)}; yours are module:function or file.py:function"
    return Ar2DiffError(f"there is no reward {name!r}", _near(source, list(GRADERS), yours))


def _check_callable(function: Any, entry: Reward) -> None:
    if not callable(function):
        raise Ar2DiffError(
            f"reward {entry.name!r} is no function but of type {type(function).__name__}",
            "name a function of (prompts, completions, **columns)",
        )
    for name in PASSED:
        if name in entry.args:
            raise Ar2DiffError(
                f"reward {entry.name!r}: args.{name} is what trl passes itself", "rename it"
            )
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # compiled code may have none
        return
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        raise Ar2DiffError(
            f"reward {entry.name!r} takes no **columns",
            "add them: it is called with every column of the data",
        )


def _module(name: str, entry: Reward) -> ModuleType:
    _on_path(Path.cwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise _not_imported(entry, error) from error
        raise Ar2DiffError(
            f"reward {entry.name!r}: there is no module {name!r}",
            "install it, run where it is, or write path/to/file.py:function",
        ) from None
    except Exception as error:
        raise _not_imported(entry, error) from error


def _file(name: str, entry: Reward) -> ModuleType:
    path = Path(name).expanduser().resolve()
    if not path.is_file():
        raise Ar2DiffError(f"reward {entry.name!r}: there is no file {name}", "mend its path")
    _on_path(path.parent)  # for files beside it, as Python does with a script's
    key = f"{path.stem}_{zlib.crc32(str(path).encode()):08x}"  # hides no module of this name
    if key not in sys.modules:
        spec = importlib.util.spec_from_file_location(key, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[key] = module  # dataclasses and pickle look it up there
        try:
            spec.loader.exec_module(module)
        except BaseException as error:
            del sys.modules[key]
            if isinstance(error, Exception):
                raise _not_imported(entry, error) from error
            raise
    return sys.modules[key]


def _on_path(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def _not_imported(entry: Reward, error: Exception) -> Ar2DiffError:
    return Ar2DiffError(
        f"reward {entry.name!r} cannot be imported: {type(error).__name__}: {first_line(error)}",
        "mend the module; python -m pdb shows where it fails",
    )


# Ours


def _graded(entry: Reward, guard: Guard) -> Callable[..., list[float | None]]:
    """One of ours, over a batch; its failures name their row."""
    grade = GRADERS[entry.name]
    if entry.name == "math" and importlib.util.find_spec("math_verify") is None:
        raise Ar2DiffError("reward math needs math-verify", "pip install 'ar2diff[math]'")
    parameters = list(inspect.signature(grade).parameters.values())[1:]
    wanted = [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY]
    arguments = _arguments(entry, grade)

    def rows(completions: Sequence[Any], columns: dict[str, Any]) -> Iterator[float]:
        for row, completion in enumerate(completions):
            values = {name: columns[name][row] for name in wanted}
            yield grade(text_of(completion, "assistant"), **values, **arguments)

    def reward(
        prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
    ) -> list[float | None]:
        for name in wanted:
            if name not in columns:
                known = [key for key in columns if key not in PASSED]
                raise Ar2DiffError(
                    f"reward {guard.name} reads column {name!r}, which the data has not "
                    f"(it has {', '.join(known) or 'none'})",
                    "rename a column of the data, or choose another reward",
                )
        values: list[float] = []

        def judge() -> None:
            for value in rows(completions, columns):
                values.append(value)  # one by one: their number tells the row that fails

        with guard.watching(prompts, values):
            call_within(guard.limit, judge)
        return guard.checked(values, prompts)

    return guard.named(reward, grade)


def _arguments(entry: Reward, grade: Callable[..., float]) -> dict[str, Any]:
    """The entry's args as the grader's annotations want them."""
    fields = {
        name: (p.annotation, ... if p.default is p.empty else p.default)
        for name, p in inspect.signature(grade, eval_str=True).parameters.items()
        if p.kind is p.KEYWORD_ONLY
    }
    model = create_model(entry.name, __config__=ConfigDict(extra="forbid"), **fields)
    try:
        values = model(**entry.args)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        if first["type"] == "extra_forbidden":
            has = ", ".join(fields) or "none"
            raise Ar2DiffError(
                f"reward {entry.name} has no argument {name!r}",
                _near(name, list(fields), f"its args: {has}"),
            ) from None
        raise Ar2DiffError(
            f"reward {entry.name}: args.{name}: {first['msg']}", "mend the reward's args"
        ) from None
    return {name: getattr(values, name) for name in fields}


def _guarded(function: Callable[..., Any], entry: Reward, guard: Guard) -> Callable[..., Any]:
    """A user's function, checked; async where it is."""
    # an object's own __call__ may be the async one
    if any(map(inspect.iscoroutinefunction, (function, function.__call__))):
        loop = LoopThread()

        async def reward(
            prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
        ) -> list[float | None]:
            passed = {**columns, **entry.args, "prompts": prompts, "completions": completions}
            with guard.watching(prompts, is_async=True):
                values = await loop.call_within(guard.limit, lambda: function(**passed))
            return guard.checked(values, prompts)

    else:

        def reward(
            prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
        ) -> list[float | None]:
            passed = {**columns, **entry.args, "prompts": prompts, "completions": completions}
            with guard.watching(prompts):
                values = call_within(guard.limit, lambda: function(**passed))
            return guard.checked(values, prompts)

    return guard.named(reward, function)
