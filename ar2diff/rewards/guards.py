"""Holding rewards to their contract: finite numbers, in time, with errors that name the reward."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any

from ..core.errors import Ar2DiffError, option, shortened
from .workers import Raised, Stopped

FLOAT32_MAX = 3.4028234663852886e38  # trl keeps rewards in float32
SHOWN = 60  # characters of a prompt or a value in an error
STOPPED_IN_A_ROW = 3  # stopped calls of a reward that end the run


class Guard:
    """Turns failures of a reward into errors or warnings that name the reward and, if known, the
    row.

    Args:
        name: the name that trl logs. limit: seconds that a batch may take.
        alone: whether this is the only reward, so that completions it skips have no reward.
    """

    def __init__(self, name: str, limit: float, alone: bool):
        self.name, self.limit, self.alone = name, limit, alone
        self._stopped = 0  # consecutive calls
        self._warned = False

    def named(self, reward: Callable[..., Any], function: Any) -> Callable[..., Any]:
        """The reward, with the name that trl logs and the docstring of the function."""
        reward.__name__ = reward.__qualname__ = self.name
        reward.__doc__ = inspect.getdoc(function)
        return reward

    def failed(
        self, raised: Raised, prompts: Sequence[Any], row: int | None = None
    ) -> Ar2DiffError:
        """The error for a reward that raised an exception.

        Args:
            row: the row of the batch that was being scored; None if unknown.
        """
        return Ar2DiffError(
            f"reward {self.name} raised {raised.kind}: {raised.message}{_where(prompts, row)}",
            f"correct {raised.place}" if row is None else "correct or remove the row",
        )

    def warn(self, stopped: Stopped, worth: str) -> None:
        """Warn once that a call was stopped, and say what its completions are worth."""
        if not self._warned:
            print(
                f"warning: reward {self.name} {stopped.why} and was stopped; {worth}. "
                "This warning is shown once.",
                file=sys.stderr,
            )
        self._warned = True

    def left_out(self, stopped: Stopped, prompts: Sequence[Any]) -> list[None]:
        """The values for a batch whose call was stopped: all None.

        Raises:
            Ar2DiffError: this is the third time in a row.
        """
        self._stopped += 1
        if self._stopped == STOPPED_IN_A_ROW:
            raise Ar2DiffError(
                f"reward {self.name} {stopped.why} and was stopped {self._stopped} times in a row"
                f"{_where(prompts, None)}",
                f"make it faster, or raise its {option('time_limit')} in rl.rewards",
            )
        self.warn(stopped, "its values for this batch are left out")
        return [None] * len(prompts)

    def done(self) -> None:
        """Note that a call returned."""
        self._stopped = 0

    def checked(self, values: Any, prompts: Sequence[Any]) -> list[float | None]:
        """The values as floats, with None for rows that are left out.

        Raises:
            Ar2DiffError: they are not one finite number or None for each prompt.
        """
        if hasattr(values, "tolist"):  # from numpy or torch
            values = values.tolist()
        if not isinstance(values, (list, tuple)):
            raise self._wrong(f"returned a {type(values).__name__}, not a list of numbers")
        if len(values) != len(prompts):
            raise self._wrong(f"returned {len(values)} values for {len(prompts)} completions")
        values = [value.item() if _is_scalar(value) else value for value in values]
        for row, value in enumerate(values):
            if value is not None and not _is_finite(value):
                raise self._wrong(f"returned {shortened(value, SHOWN)}{_where(prompts, row)}")
        if self.alone and all(value is None for value in values):
            raise self._wrong(f"returned None for all rows{_where(prompts, None)}")
        return [None if value is None else float(value) for value in values]

    def _wrong(self, what: str) -> Ar2DiffError:
        return Ar2DiffError(
            f"reward {self.name} {what}",
            "make it return a list with one finite number, or None, for each completion",
        )


def _is_scalar(value: Any) -> bool:
    """A number of numpy's or torch's."""
    return hasattr(value, "item") and getattr(value, "shape", None) == ()


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and abs(value) <= FLOAT32_MAX  # False for NaN


def _where(prompts: Sequence[Any], row: int | None) -> str:
    """Identify a row of a batch by its prompt, or the batch by its first prompt."""
    if row is not None and row >= len(prompts):
        return ""
    prompt = " ".join(text_of(prompts[row or 0]).split())
    prompt = prompt if len(prompt) <= SHOWN else f"{prompt[: SHOWN - 1]}…"
    if row is None:
        return f" in a batch whose first prompt is {prompt!r}"
    return f" at row {row} of a batch, prompt {prompt!r}"


def text_of(turns: Any, role: str | None = None) -> str:
    """A text unchanged; for messages, the content of the last one, or of the last with a role."""
    if isinstance(turns, str):
        return turns
    turns = [turn for turn in turns if role in (None, turn.get("role"))]
    content = turns[-1].get("content") if turns else None
    if isinstance(content, list):  # content parts, some of which may be images
        content = "".join(part.get("text") or "" for part in content)
    return content or ""
