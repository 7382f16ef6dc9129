"""What happens in a chat, for a screen to draw."""

from __future__ import annotations

from dataclasses import dataclass

from .results import Completion, summary
from .writing import Writing


@dataclass(frozen=True)
class Note:
    """A remark about the conversation."""

    text: str


@dataclass(frozen=True)
class Problem:
    """A mistake of the user: what is wrong, and what to do about it."""

    what: str
    fix: str


@dataclass(frozen=True)
class Step:
    """A forward has been taken.

    Attributes:
        writings: the answer that is being written, and the one to compare it with if there is one.
    """

    writings: tuple[Writing, ...]


@dataclass(frozen=True)
class Answer:
    """A finished answer.

    Attributes:
        result: its text and figures. mode: that wrote it.
        stopped: the user stopped it.
        ended: the model wrote an end token; otherwise there was no room for more.
        beside: what the AR mode has written, if it was asked for a comparison.
    """

    result: Completion
    mode: str
    stopped: bool
    ended: bool
    beside: Completion | None = None

    @property
    def summary(self) -> str:
        """Its length and speed, in a line."""
        return summary([self.result]) + (", stopped" if self.stopped else "")


@dataclass(frozen=True)
class End:
    """The user leaves."""


Event = Note | Problem | Step | Answer | End
