"""Loading the rewards that a recipe names, guarded and in the form that trl calls."""

from __future__ import annotations

import asyncio
import functools
import importlib
import importlib.util
import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, ValidationError, create_model

from ..config.functions import function_of, near
from ..config.rl import Reward
from ..core.errors import Ar2DiffError, first_line, shortened
from .builtin import GRADERS
from .guards import Guard, text_of
from .sandbox import STARTING, check_sandbox, enter
from .workers import Raised, Stopped, Worker, confine

MODEL = "model:"  # prefix of the folder or Hub id of a reward model
NOTES = ("log_extra", "log_metric")  # callbacks that trl passes
PASSED = ("prompts", "completions", "completion_ids", "trainer_state", *NOTES)
IMAGES = "images"  # the column of the images of each prompt
UNBOUNDED = ("regex", "math")  # built-in rewards that can run forever
SANDBOXED = "code"  # the one that runs programs
SECONDS = 2.0  # minimum per completion, out of the time_limit of a batch


def make_rewards(entries: Sequence[Reward]) -> list[Callable[..., Any] | str]:
    """The rewards in the form of trl's `reward_funcs`, in the order of the entries.

    An entry's name is that of a built-in reward (`builtin.GRADERS`), `module:function` (the current
    folder is searched too), `path/to/file.py:function`, or `model:PATH`. A function, sync or async,
    is called as `function(prompts=, completions=, **columns, **args)` and returns a number, or None
    for "does not apply", for each completion. One with a parameter `images` gets, for each, a list
    of the images of its prompt, as Pillow has them. It runs in a forked process of its own, which
    keeps its state between calls and is killed if a call takes longer than `time_limit`; the batch
    then has no values from it, and the run goes on. Built-in rewards that can run forever are
    treated alike, but the completion at fault scores 0. A model's path is returned as is: trl loads
    it.

    Raises:
        Ar2DiffError: a reward cannot be found, or does not fit. The returned functions raise it if
            the reward raises an exception, returns anything else, or is stopped in three calls in a
            row. A batch may be all None only if there are other rewards.
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
    """The name, or name_2, name_3 ... if it is taken, since trl logs by name."""
    numbers = iter(range(2, len(taken) + 3))
    free = name
    while free in taken:
        free = f"{name}_{next(numbers)}"
    taken.add(free)
    return free


def _model(entry: Reward) -> str:
    path = entry.name.removeprefix(MODEL)
    if entry.args:
        raise Ar2DiffError(
            f"reward {shortened(entry.name)}: a reward model takes no arguments", "remove its args"
        )
    folder = Path(path).expanduser()
    if path and (folder / "config.json").is_file():
        return str(folder)
    is_id = path and not folder.exists() and path.count("/") < 2 and path[0] not in "./~"
    if not is_id:
        raise Ar2DiffError(
            f"reward {shortened(entry.name)}: there is no model at {shortened(path)}",
            "give the folder or Hub id of a sequence classification model, for example "
            "model:USER/NAME",
        )
    return path


def _own(entry: Reward) -> tuple[Callable[..., Any], str]:
    """A function written by the user, and its name."""
    if not all(entry.name.rpartition(":")):
        raise _nameless(entry.name)
    function = function_of(entry.name, "reward")
    _check_callable(function, entry)
    return function, entry.name.rpartition(":")[2].rpartition(".")[2]


def _nameless(name: str) -> Ar2DiffError:
    """The error for a name that is neither built in nor source:function."""
    source = name.strip(":")
    if source.endswith(".py") or (source and name.endswith(":")):
        return Ar2DiffError(f"reward {name!r} names no function", f"write {source}:FUNCTION")
    yours = f"use one of {', '.join(GRADERS)}, or your own as module:function or file.py:function"
    return Ar2DiffError(f"there is no reward {name!r}", near(source, list(GRADERS), yours))


def _check_callable(function: Any, entry: Reward) -> None:
    for name in PASSED:
        if name in entry.args:
            raise Ar2DiffError(
                f"reward {entry.name!r}: trl passes {name} itself, so it cannot be in args",
                "rename that parameter of the function",
            )
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # compiled code may have no signature
        return
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        raise Ar2DiffError(
            f"reward {entry.name!r} does not take **columns",
            "add **columns to its parameters: it is called with every column of the data",
        )


# Built-in rewards


def _graded(entry: Reward, guard: Guard) -> Callable[..., list[float | None]]:
    """A built-in reward, applied to a batch. Its errors name the row."""
    grade = GRADERS[entry.name]
    judge = _judge(entry, guard, functools.partial(grade, **_arguments(entry, grade)))
    parameters = list(inspect.signature(grade).parameters.values())[1:]
    wanted = {p.name: p.default is p.empty for p in parameters if p.kind is not p.KEYWORD_ONLY}

    def reward(
        prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
    ) -> list[float | None]:
        given = {"prompt": [text_of(prompt, "user") for prompt in prompts], **columns}
        for name, needed in wanted.items():
            if needed and name not in given:
                known = [key for key in columns if key not in PASSED]
                raise Ar2DiffError(
                    f"reward {guard.name} reads column {name!r}, which the data does not have "
                    f"(it has {', '.join(known) or 'none'})",
                    f"rename the column of the data to {name}, or choose another reward",
                )
        own = {name: given[name] for name in wanted if name in given}
        return guard.checked(judge(prompts, completions, own), prompts)

    return guard.named(reward, grade)


def _judge(entry: Reward, guard: Guard, grade: Callable[..., float]) -> Judge:
    """A grader with its arguments, applied to a batch where that is safe."""

    def grades(completions: Sequence[Any], columns: dict[str, Any]) -> Iterator[float]:
        def score(row: int) -> float:
            values = {name: column[row] for name, column in columns.items()}
            return grade(text_of(completions[row], "assistant"), **values)

        if entry.name != SANDBOXED:
            yield from map(score, range(len(completions)))
            return
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:  # which wait for sandboxes
            yield from pool.map(score, range(len(completions)))

    if entry.name == SANDBOXED:
        check_sandbox()
        seconds = min(grade.keywords["seconds"], entry.time_limit)
        grade = functools.partial(grade, seconds=seconds)
        return _judged_apart(grades, guard, enter, seconds + 2 * STARTING)  # keeps the time itself
    if entry.name == "math":
        if importlib.util.find_spec("math_verify") is None:
            raise Ar2DiffError("reward math needs math-verify", "pip install 'ar2diff[math]'")
        importlib.import_module("math_verify")  # once, not in each worker: it takes seconds
    if entry.name in UNBOUNDED:
        return _judged_apart(grades, guard, confine)
    return _judged_here(grades, guard)


Grades = Callable[[Sequence[Any], dict[str, Any]], Iterator[float]]
Judge = Callable[[Sequence[Any], Sequence[Any], dict[str, Any]], list[float]]


def _judged_here(grades: Grades, guard: Guard) -> Judge:
    """Run graders whose time is bounded by the length of the text in this process."""

    def judge(
        prompts: Sequence[Any], completions: Sequence[Any], columns: dict[str, Any]
    ) -> list[float]:
        values: list[float] = []
        try:
            for value in grades(completions, columns):
                values.append(value)  # one by one, so that their number tells which row fails
        except ValueError as error:
            raised = Raised(type(error).__name__, first_line(error), "")
            raise guard.failed(raised, prompts, len(values)) from error
        return values

    return judge


def _judged_apart(
    grades: Grades, guard: Guard, prepare: Callable[[], None], longest: float | None = None
) -> Judge:
    """Run graders that can take forever in a process of their own. When one is stuck on a
    completion, the process is killed and replaced, and the completion scores 0.

    Args:
        prepare: what the process does first. longest: seconds that a completion may take; None for
            its share of the time of the batch.
    """
    worker = Worker(grades, prepare)

    def judge(
        prompts: Sequence[Any], completions: Sequence[Any], columns: dict[str, Any]
    ) -> list[float]:
        values: list[float] = []
        share = min(guard.limit, max(SECONDS, guard.limit / max(1, len(completions))))
        seconds = longest or share
        while (done := len(values)) < len(completions):
            rest = {name: column[done:] for name, column in columns.items()}
            for value in worker.values(
                seconds, {"completions": completions[done:], "columns": rest}
            ):
                if isinstance(value, Raised):
                    raise guard.failed(value, prompts, len(values))
                if isinstance(value, Stopped):
                    guard.warn(value, "the completion scores 0")
                    value = 0.0
                values.append(value)
        return values

    return judge


def _arguments(entry: Reward, grade: Callable[..., float]) -> dict[str, Any]:
    """The args of an entry, validated by the grader's annotations."""
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
                near(name, list(fields), f"its args: {has}"),
            ) from None
        raise Ar2DiffError(
            f"reward {entry.name}: args.{name}: {first['msg']}",
            f"correct args.{name} of the reward",
        ) from None
    return {name: getattr(values, name) for name in fields}


def _guarded(function: Callable[..., Any], entry: Reward, guard: Guard) -> Callable[..., Any]:
    """A user's function, checked, in a process of its own; async if the function is."""
    sees = _has_parameter(function, IMAGES)

    def judge(notes: list[str], passed: dict[str, Any]) -> Any:
        if sees and IMAGES in passed:
            passed[IMAGES] = [[shot.pixels() for shot in shots] for shots in passed[IMAGES]]
        noted: list[Any] = []
        writers = {name: functools.partial(_note, noted, name) for name in notes}
        values = function(**passed, **writers)

        async def later() -> list[Any]:
            return [guard.checked(await values, passed["prompts"]), noted]

        if inspect.isawaitable(values):
            return later()
        return [guard.checked(values, passed["prompts"]), noted]

    worker = Worker(judge)

    def judged(prompts: Sequence[Any], passed: dict[str, Any]) -> list[float | None]:
        writers = {name: passed.pop(name) for name in NOTES if name in passed}
        if not sees:
            passed.pop(IMAGES, None)
        found = worker.call(guard.limit, {"notes": list(writers), "passed": passed})
        if isinstance(found, Raised):
            raise guard.failed(found, prompts)
        if isinstance(found, Stopped):
            return guard.left_out(found, prompts)
        guard.done()
        values, noted = found
        for name, args, kwargs in noted:
            writers[name](*args, **kwargs)
        return values

    # for an object, __call__ may be the async function
    if any(map(inspect.iscoroutinefunction, (function, function.__call__))):

        async def reward(
            prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
        ) -> list[float | None]:
            passed = {**columns, **entry.args, "prompts": prompts, "completions": completions}
            return await asyncio.to_thread(judged, prompts, passed)  # other rewards run meanwhile
    else:

        def reward(
            prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
        ) -> list[float | None]:
            passed = {**columns, **entry.args, "prompts": prompts, "completions": completions}
            return judged(prompts, passed)

    return guard.named(reward, function)


def _has_parameter(function: Callable[..., Any], name: str) -> bool:
    try:
        return name in inspect.signature(function).parameters
    except (TypeError, ValueError):  # compiled code may have no signature
        return False


def _note(noted: list[Any], name: str, *args: Any, **kwargs: Any) -> None:
    """Record a call of trl's `log_extra` or `log_metric`, to be replayed in the main process."""
    noted.append((name, args, kwargs))
