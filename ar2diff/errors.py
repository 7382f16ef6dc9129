"""The one error a user is meant to see: what is wrong, and what to do about it."""

from __future__ import annotations


class Ar2DiffError(Exception):
    """A mistake the user can mend. The command line prints two lines and exits with 2.

    Args:
        what: what is wrong, naming the file, key or row.
        fix: what to do about it.
    """

    def __init__(self, what: str, fix: str):
        super().__init__(f"{what} (fix: {fix})")  # one line: servers put it in theirs
        self.what = what
        self.fix = fix


def first_line(error: BaseException) -> str:
    """What a library's error says, in one line; its class where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
