"""Questions that have a right answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Question:
    """A prompt whose answer is right or wrong.

    Attributes:
        answer: a right one, in full.
        score: whether a completion answers it correctly.
        ids: the prompt as tokens and codes of images; none if it is a text.
        reply: token ids of the right answer behind it, up to its end.
        images: keys of those that it shows.
        name: tells it from others, wherever it is read.
    """

    prompt: str
    answer: str
    score: Callable[[str], bool]
    ids: tuple[int, ...] = ()
    reply: tuple[int, ...] = ()
    images: tuple[int, ...] = ()
    name: str = ""
