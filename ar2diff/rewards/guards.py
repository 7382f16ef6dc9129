"""What holds rewards to their contract: numbers, in time, and errors that say whose they are."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.errors import Ar2DiffError, first_line
from .timeouts import TimedOut

FLOAT32_MAX = 3.4028234663852886e38  # trl keeps rewards in float32
SHOWN = 60  # characters of a prompt in an error


@dataclass(frozen=True)
class Guard:
    """Makes of what goes wrong in a reward an error that names it, and the row if it is known."""

    name: str
    limit: float  # seconds
    alone: bool  # no other reward judges what this one leaves out

    def named(self, reward: Callable[..., Any], function: Any) -> Callable[..., Any]:
        """The reward with the name that trl logs, and the function's docstring."""
        reward.__name__ = reward.__qualname__ = self.name
        reward.__doc__ = inspect.getdoc(function)
        return reward

    @contextmanager
    def watching(
        self, prompts: Sequence[Any], values: Sequence[Any] | None = None, is_async: bool = False
    ) -> Iterator[None]:
        """Around a call.

        Args:
            values: those of the rows before the one that is judged, if that is known.
            is_async: exits count as failures: trl's event loop would die of them, and trl wait.
        """
        try:
            yield
        except TimedOut:
            raise Ar2DiffError(
                f"reward {self.name} took longer than {self.limit:g} seconds"
                f"{_where(prompts, values)}",
                "mend it, or raise the reward's time_limit",
            ) from None
        except BaseException as error:
            if not isinstance(error, Exception) and not (is_async and _is_exit(error)):
                raise
            frame = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{Path(frame.filename).name}, line {frame.lineno}"
            raise Ar2DiffError(
                f"reward {self.name} raised {type(error).__name__}: {first_line(error)}"
                f"{_where(prompts, values)}",
                f"mend {place}" if values is None else "mend or remove the row",
            ) from error

    def checked(self, values: Any, prompts: Sequence[Any]) -> list[float | None]:
        """The values as floats, None where a row is left out.

        Raises:
            Ar2DiffError: they are not one finite number or None for each prompt.
        """
        if hasattr(values, "tolist"):  # of numpy or torch
            values = values.tolist()
        if not isinstance(values, (list, tuple)):
            raise self._wrong(f"returned a {type(values).__name__}, not a list of numbers")
        if len(values) != len(prompts):
            raise self._wrong(f"returned {len(values)} values for {len(prompts)} completions")
        values = [value.item() if _is_scalar(value) else value for value in values]
        for row, value in enumerate(values):
            if value is not None and not _is_finite(value):
                # Python writes out no whole number of 5,000 digits
                shown = "a huge number" if isinstance(value, int) else repr(value)[:SHOWN]
                raise self._wrong(f"returned {shown}{_where(prompts, values[:row])}")
        if self.alone and all(value is None for value in values):
            raise self._wrong(f"returned None for all rows{_where(prompts, None)}")
        return [None if value is None else float(value) for value in values]

    def _wrong(self, what: str) -> Ar2DiffError:
        return Ar2DiffError(
            f"reward {self.name} {what}",
            "it has to return a list with a finite number, or None, for each completion",
        )


def _is_exit(error: BaseException) -> bool:
    return isinstance(error, (SystemExit, KeyboardInterrupt))


def _is_scalar(value: Any) -> bool:
    """A number of numpy's or torch's."""
    return hasattr(value, "item") and getattr(value, "shape", None) == ()


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and abs(value) <= FLOAT32_MAX  # of NaN it is False


def _where(prompts: Sequence[Any], values: Sequence[Any] | None) -> str:
    """The row after those of the values, or the batch by its first row."""
    row = 0 if values is None else len(values)
    if row >= len(prompts):
        return ""
    prompt = " ".join(text_of(prompts[row]).split())
    prompt = prompt if len(prompt) <= SHOWN else f"{prompt[: SHOWN - 1]}…"
    if values is None:
        return f" in a batch whose first prompt is {prompt!r}"
    return f" at row {row} of a batch, prompt {prompt!r}"


def text_of(turns: Any, role: str | None = None) -> str:
    """A text; of messages, what the last one says, or the last one of a role."""
    if isinstance(turns, str):
        return turns
    turns = [turn for turn in turns if role in (None, turn.get("role"))]
    content = turns[-1].get("content") if turns else None
    if isinstance(content, list):  # parts, some of which may be images
        content = "".join(part.get("text") or "" for part in content)
    return content or ""
