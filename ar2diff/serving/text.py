"""The text of an answer while its tokens come in: never half a character, never a part of a stop
string."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..generation.prompts import Segments
from ..generation.results import Completion
from ..generation.tokens import UNKNOWN, decode, draw_tokens, with_gaps_filled


@dataclass(frozen=True)
class Token:
    """A token of an answer, to be told with its log-probability.

    Attributes:
        text: what it adds to the answer: "" for the first bytes of a character, and for special
            tokens.
        name: of a special token its name, else the text.
    """

    text: str
    name: str


def name_of(tokenizer: Any, token: int) -> str:
    """How a token is called: by its text, or, if it is special, by its name."""
    if token in tokenizer.all_special_ids:
        return tokenizer.decode([token])
    return draw_tokens(tokenizer, [token], -1)[0]


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


class Shown:
    """A text that grows, and how much of it was shown."""

    def __init__(self) -> None:
        self.text, self.shown = "", ""

    def show(self, text: str) -> str:
        """Show a text; returns what is new in it."""
        while not text.startswith(self.shown):  # a tokenizer that tidies up may take a space back
            self.shown = self.shown[:-1]
        new, self.shown = text[len(self.shown) :], text
        return new

    def cut(self) -> str:
        """Show all that there is."""
        return self.show(self.text)


class Text(Shown):
    """The text of an answer, token by token.

    Args:
        before: ids of the prompt.
        stops: texts that end the answer, and are not part of it.

    Attributes:
        text: all that has come in, with what is held back.
        shown: what may be seen; of a finished answer, all of it.
        offsets: where the text of each token begins.
        stopped: whether a stop string has ended it.
    """

    def __init__(self, tokenizer: Any, before: Sequence[int], stops: Sequence[str] = ()):
        super().__init__()
        self.tokenizer, self.stops = tokenizer, stops
        self.decoder = Decoder(tokenizer, before)
        self.offsets: list[int] = []
        self.stopped = False

    def add(self, ids: Sequence[int]) -> str:
        """The text that may be shown since the last call."""
        for token in ids:
            self.offsets.append(len(self.text))
            self.text += self.decoder.add([token])
        return self.show(self.text[: self._certain()])

    def end(self, result: Completion, stops: bool) -> str:
        """The rest of the text.

        Args:
            stops: something has ended it, perhaps a stop string within its last token.
        """
        self.text = result.text
        place = self._stop() if stops else None
        self.stopped = place is not None
        return self.show(self.text[:place])

    def _stop(self) -> int | None:
        """Where a stop string begins that ends within the last token."""
        last = self.offsets[-1] if self.offsets else 0
        found = (self.text.find(stop, max(0, last - len(stop) + 1)) for stop in self.stops)
        return min((place for place in found if place >= 0), default=None)

    def _certain(self) -> int:
        """How much of the text can be no part of a stop string."""
        place, size = self._stop(), len(self.text)
        certain = size if place is None else place
        for stop in self.stops:
            for begun in range(min(len(stop) - 1, size), 0, -1):
                if self.text.endswith(stop[:begun]):
                    certain = min(certain, size - begun)
                    break
        return certain

    def ready(self, first: int, over: bool) -> list[Token]:
        """The tokens whose text is shown, from one on.

        Args:
            over: no more will come.
        """
        found = []
        begins = self.offsets[first:]
        ends = [*begins[1:], len(self.text)][: len(begins)]
        ids = self.decoder.ids[len(self.decoder.ids) - len(begins) :]
        for token, begin, end in zip(ids, begins, ends, strict=True):
            if begin >= len(self.shown) if self.stopped else end > len(self.shown) and not over:
                break
            text = self.text[begin:end]
            special = not text and token in self.tokenizer.all_special_ids
            found.append(Token(text, name_of(self.tokenizer, token) if special else text))
        return found


class Stops:
    """Says of ids whether their last token ends a stop string. Unlike the criterion of transformers
    it need not know the whole vocabulary, which takes seconds for each new string.

    Args:
        stops: at least one text.
        begin: ids of the prompt, in which no stop string begins.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str], begin: int):
        self.tokenizer, self.stops, self.begin = tokenizer, stops, begin
        # A character has four bytes at most, and a token one at least; the last token may be long.
        self.reach = 4 * max(map(len, stops)) + 8

    def __call__(self, row: int, ids: Tensor) -> bool:
        """Whether a row is to end here.

        Args:
            ids: of the row, up to a new token.
        """
        start = max(0, len(ids) - self.reach)
        tail = ids[start:].tolist()
        text, before = self._text(tail), self._text(tail[:-1])
        first = len(self._text(tail[: self.begin - start])) if start < self.begin else 0
        pairs = enumerate(zip(text, before, strict=False))
        new = next((n for n, (a, b) in pairs if a != b), min(len(text), len(before)))
        return any(text.find(stop, max(first, new - len(stop) + 1)) >= 0 for stop in self.stops)

    def _text(self, ids: list[int]) -> str:
        return decode(self.tokenizer, ids)


class Filling(Shown):
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
        super().__init__()
        self.tokenizer, self.segments, self.gaps, self.whole = tokenizer, segments, gaps, whole
        self.ids = list(before[: gaps[0]])
        self.gap = gaps[0], gaps[0] + segments[1]

    def add(self, ids: Sequence[int]) -> str:
        """The text that may be shown since the last call."""
        self.ids += ids
        texts = with_gaps_filled(self.tokenizer, self.segments, self.ids, self.gaps)
        text = "".join(texts if self.whole else texts[1:2])
        if text.endswith(UNKNOWN) or not text.startswith(self.shown):
            return ""
        self.text = text
        return self.show(text)

    def end(self, result: Completion, stops: bool) -> str:
        """The rest of the text."""
        self.text = result.text if self.whole else (result.filled or ("",))[0]
        return self.show(self.text)

    def ready(self, first: int, over: bool) -> list[Token]:
        """The tokens of the first gap, from one on, as far as they are known."""
        begin, end = self.gap
        texts = draw_tokens(self.tokenizer, self.ids[begin:end], -1)
        return [Token(text, text) for text in texts[first:]]
