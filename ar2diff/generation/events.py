"""What happens in a chat, for a screen to draw."""

from __future__ import annotations

from dataclasses import dataclass


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
class State:
    """An answer that is being written, after a forward.

    Attributes:
        ids: its tokens up to the end of the block that is being denoised; masks where undecided.
        steps: the forward at which each was decided.
        forward: the number of the last forward.
        mask_token_id: the id of an undecided token.
    """

    ids: list[int]
    steps: list[int]
    forward: int
    mask_token_id: int


@dataclass(frozen=True)
class Answer:
    """A finished answer.

    Attributes:
        stopped: the user stopped it.
        ended: the model wrote an end token; otherwise there was no room for more.
    """

    text: str
    new_tokens: int
    forwards: int
    seconds: float
    stopped: bool
    ended: bool

    @property
    def summary(self) -> str:
        """Its length and speed, in a line."""
        return (
            f"{self.new_tokens} tokens, {self.forwards} forwards, "
            f"{self.new_tokens / max(self.forwards, 1):.2f} tokens per forward, "
            f"{self.new_tokens / max(self.seconds, 1e-9):.0f} tokens/s"
            + (", stopped" if self.stopped else "")
        )


@dataclass(frozen=True)
class End:
    """The user leaves."""


Event = Note | Problem | State | Answer | End
