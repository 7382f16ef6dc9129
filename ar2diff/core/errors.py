"""The one error a user is meant to see: what is wrong, and what to do about it.

This file is copied into converted folders: it imports the standard library alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable

# An option within a message. The two control characters occur in no text that a user gives us
# unescaped, so that nothing but `option` makes a mention.
_OPTION = re.compile("\x02([^\x02\x03=]*)(?:=([^\x02\x03]*))?\x03")


def option(name: str, value: object = None) -> str:
    """A mention of an option in a message. Each surface writes it in its own way: `--top-k 5` on
    the command line, `top_k=5` in Python, `rl.sampler.top_k=5` in a recipe.

    Args:
        name: a keyword of the API (`top_k`), or the dotted key of a recipe (`data.max_length`).
        value: a value to set it to; None mentions the name alone.
    """
    return f"\x02{name}\x03" if value is None else f"\x02{name}={value}\x03"


def as_keyword(name: str, value: str | None) -> str:
    """How Python writes an option."""
    return name if value is None else f"{name}={value}"


class Ar2DiffError(Exception):
    """A mistake that the user can fix. The command line prints two lines and exits with 2.

    Args:
        what: what is wrong, naming the file, key or row. Options in it are written by `option`.
        fix: what to do about it, likewise.

    Attributes:
        what, fix: as Python names options; `named` gives them in another surface's names.
        option: the name of the option that the error is about, the first that `what` mentions;
            None if it mentions none.
    """

    def __init__(self, what: str, fix: str):
        self._what, self._fix = what, fix
        self.what, self.fix = _written(what, as_keyword), _written(fix, as_keyword)
        mention = _OPTION.search(what)
        self.option = mention[1] if mention else None
        super().__init__(f"{self.what} (fix: {self.fix})")  # one line: servers put it in theirs

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (self._what, self._fix)

    def named(self, write: Callable[[str, str | None], str]) -> Ar2DiffError:
        """The same error with every option written by `write(name, value)`."""
        return Ar2DiffError(_written(self._what, write), _written(self._fix, write))

    def within(self, section: str) -> Ar2DiffError:
        """The same error about options that stand in a section of a recipe."""
        return self.named(lambda name, value: option(f"{section}.{name}", value))

    def about(self, subject: str) -> Ar2DiffError:
        """The same error, saying first which of many things it is about: a row, a file."""
        return Ar2DiffError(f"{subject}: {self._what}", self._fix)


def first_line(error: BaseException) -> str:
    """The first line of what a library's error says; its class name where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _written(text: str, write: Callable[[str, str | None], str]) -> str:
    return _OPTION.sub(lambda mention: write(mention[1], mention[2]), text)
