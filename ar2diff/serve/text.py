"""The text of an answer while its tokens come in: never half a character, never a part of a stop
string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..generation.prompts import Segments
from ..generation.tokens import UNKNOWN, decode, with_gaps_filled


class Decoder:
    """Decodes tokens as they come, reading no more than the last of them again.

    Args:
        before: ids that they follow.
    """

    def __init__(self, tokenizer: Any, before: Sequence[int]):
        self.tokenizer, self.ids = tokenizer, list(before)
        self.start, self.read = 0, len(self.ids)

    def add(self, ids: Sequence[int]) -> str:
        """The text that tokens add; a character that takes several comes with the last of them."""
        self.ids += ids
        before = decode(self.tokenizer, self.ids[self.start : self.read])
        text = decode(self.tokenizer, self.ids[self.start :])
        if text.endswith(UNKNOWN) or len(text) <= len(before):
            return ""
        self.start, self.read = self.read, len(self.ids)
        return text[len(before) :]


class Text:
    """The text of an answer, token by token.

    Args:
        before: ids of the prompt.
        stops: texts that end the answer, and are not part of it.

    Attributes:
        text: all that has come in, with what is held back.
        offsets: where the text of each token begins in it.
    """

    def __init__(self, tokenizer: Any, before: Sequence[int], stops: Sequence[str] = ()):
        self.decoder, self.stops = Decoder(tokenizer, before), stops
        self.text, self.shown, self.last = "", "", 0
        self.offsets: list[int] = []
        longest = max(map(len, stops), default=0)
        # a stop string may begin in the prompt
        self.prompt = decode(tokenizer, before)[1 - longest :] if longest > 1 else ""

    def add(self, ids: Sequence[int]) -> str:
        """The text that may be shown since the last call."""
        for token in ids:
            self.last = len(self.text)
            self.offsets.append(self.last)
            self.text += self.decoder.add([token])
        return self._show(self.text[: self._held()])

    def end(self, text: str, stopped: bool) -> str:
        """The rest of the text, once it is finished.

        Args:
            text: all of it, as `generate` returns it.
            stopped: something has ended it, perhaps a stop string within its last token.
        """
        found = self._stop_in(text) if stopped else None
        return self._show(text if found is None else text[:found])

    def _show(self, text: str) -> str:
        while not text.startswith(self.shown):  # a tokenizer that tidies up may take a space back
            self.shown = self.shown[:-1]
        new, self.shown = text[len(self.shown) :], text
        return new

    def _stop_in(self, text: str) -> int | None:
        """Where a stop string begins that ends within the last token."""
        whole, found = self.prompt + text, []
        for stop in self.stops:
            first = max(0, len(self.prompt) + self.last - len(stop) + 1)
            place = whole.find(stop, first)
            if place >= 0:
                found.append(max(0, place - len(self.prompt)))
        return min(found, default=None)

    def _held(self) -> int:
        """How much of the text can be no part of a stop string."""
        found = self._stop_in(self.text)
        places = [len(self.text) if found is None else found]
        whole = self.prompt + self.text
        for stop in self.stops:
            for size in range(min(len(stop) - 1, len(whole)), 0, -1):
                if whole.endswith(stop[:size]):
                    places.append(max(0, len(self.text) - size))
                    break
        return min(places)


class Filling:
    """The text of a prompt whose gaps are being filled.

    Args:
        before: ids of the prompt, with masks in its gaps.
        segments: what they encode.
        gaps: the places of all masks.
        whole: the text is the whole prompt, not its first gap alone.
    """

    def __init__(
        self,
        tokenizer: Any,
        before: Sequence[int],
        segments: Segments,
        gaps: Sequence[int],
        whole: bool,
    ):
        self.tokenizer, self.segments, self.gaps, self.whole = tokenizer, segments, gaps, whole
        self.ids, self.size = list(before[: gaps[0]]), len(before)
        self.text, self.shown = "", ""

    def add(self, ids: Sequence[int]) -> str:
        """The text that may be shown since the last call."""
        self.ids += ids
        texts = with_gaps_filled(self.tokenizer, self.segments, self.ids[: self.size], self.gaps)
        self.text = "".join(texts if self.whole else texts[1:2])
        if self.text.endswith(UNKNOWN) or not self.text.startswith(self.shown):
            return ""
        return self._show(self.text)

    def end(self, text: str, stopped: bool) -> str:
        """The rest of the text, once it is finished."""
        while not text.startswith(self.shown):
            self.shown = self.shown[:-1]
        return self._show(text)

    def _show(self, text: str) -> str:
        new, self.shown = text[len(self.shown) :], text
        return new
