"""A text that is being written, a forward at a time: what screens draw and streams print."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..checkpoint.model import Checkpoint
from ..core.conflicts import DENOISING
from ..core.options import Options
from ..core.spec import Spec
from ..core.speculation import PACES
from ..data.album import Album
from .complete import begin, result_of, settings_of
from .images import album_of, encode_prompt
from .prompts import split_gaps
from .results import Completion
from .tokens import UNKNOWN, draw_tokens, text_after, with_gaps_filled


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a text on a screen: a token, or a text between gaps.

    Attributes:
        text: a dot for an undecided token.
        step: the forward at which the token was decided; 0 for one that is undecided or given.
        logprob: its log-probability in that forward.
        undecided: whether it is.
        opens: a block begins with it.
        drafted: it was drafted, and the AR mode has accepted it.
        again: it was on the screen, and has been masked again since.
    """

    text: str
    step: int = 0
    logprob: float = 0.0
    undecided: bool = False
    opens: bool = False
    drafted: bool = False
    again: bool = False


@dataclass(frozen=True)
class State:
    """A text after a forward.

    Attributes:
        mode: that writes it.
        pieces: in order, up to the end of the block that is being denoised.
        forwards, new_tokens, seconds: until now; the seconds are the model's alone.
    """

    mode: str
    pieces: list[Piece]
    forwards: int
    new_tokens: int
    seconds: float


class Writing:
    """One text that is being written. `step` decides more of it; what happens between two steps is
    not counted as the model's time.

    Args:
        spec, options: of `settings_of`.
        ids: the row, with masks for gaps.
        prompt: what `ids` encode, to be shown with the text; None for a conversation, whose answer
            is a text of its own.
        album: of the images that the row has codes of.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        spec: Spec,
        options: Options,
        ids: Sequence[int],
        prompt: str | None = None,
        album: Album | None = None,
    ):
        self.checkpoint, self.spec, self.options = checkpoint, spec, options
        self.asked, self.seconds = prompt, 0.0
        self.segments = [""] if prompt is None else split_gaps(prompt)
        if options.mode == "speculative" and checkpoint.model not in PACES:
            # How many drafts pay is measured in a model's first step, which is not a text's time.
            next(begin(checkpoint, spec, options, [ids], album=album)[1], None)
        self.canvas, self._states = begin(checkpoint, spec, options, [ids], [self.segments], album)
        canvas = self.canvas
        self.prompt = int(canvas.prompt[0])
        self.gaps = (~canvas.given[0, : self.prompt]).nonzero()[:, 0].tolist()
        self.again = torch.zeros_like(canvas.given[0])

    @classmethod
    def of_prompt(
        cls,
        checkpoint: Checkpoint,
        prompt: str,
        settings: dict[str, Any],
        images: Sequence[Any] = (),
    ) -> Writing:
        """The continuation of a prompt, or the filling of its gaps.

        Args:
            images: as of `key_of`, in their order.

        Raises:
            Ar2DiffError: as `complete_all`.
        """
        segments = split_gaps(prompt)
        gaps = len(segments) > 1
        spec, options = settings_of(
            checkpoint, {"max_new_tokens": 0, **settings} if gaps else settings, gaps
        )
        album = album_of(checkpoint) if images else None
        ids = encode_prompt(checkpoint, spec, segments, images, album)
        return cls(checkpoint, spec, options, ids, prompt, album)

    def step(self) -> bool:
        """Decide more of the text; returns whether there was anything to decide."""
        canvas = self.canvas
        known = ~canvas.open[0] if self.options.remask else None
        start = time.monotonic()
        going = next(self._states, None) is not None
        self.seconds += time.monotonic() - start
        if known is not None:
            self.again |= known & canvas.open[0]
        return going

    @property
    def done(self) -> bool:
        """Whether the text is finished."""
        return bool(self.canvas.done[0])

    def parts(self) -> Iterator[str]:
        """Write the text, yielding parts of it, from the prompt on, as soon as a part and all
        before it is decided for good."""
        shown = ""
        while self.step():
            text = self.text()
            # Half a character ends in a replacement mark, but text that was shown must not change.
            if not text.endswith(UNKNOWN) and text.startswith(shown):
                yield text[len(shown) :]
                shown = text
        text = self.result().whole_text
        while not text.startswith(shown):  # a tokenizer that tidies up may take a space back
            shown = shown[:-1]
        yield text[len(shown) :]

    def text(self) -> str:
        """As much of the text, from the prompt on, as is decided for good without a gap."""
        canvas, tokenizer = self.canvas, self.checkpoint.tokenizer
        ids = canvas.ids[0, : canvas.certain(0, self.options.revised)].tolist()
        prompt, new = ids[: self.prompt], ids[self.prompt :]
        texts = with_gaps_filled(tokenizer, self.segments, prompt, self.gaps)
        return "".join(texts) + (text_after(tokenizer, prompt, new) if new else "")

    def result(self) -> Completion:
        """The completion: as much as is decided without a gap, if it was stopped."""
        result = result_of(
            self.checkpoint, self.spec, self.options, self.canvas, 0, self.seconds, self.segments
        )
        return replace(result, prompt=self.asked)

    def state(self) -> State:
        """What there is to draw."""
        canvas, mode = self.canvas, self.options.mode
        start = self.gaps[0] if self.gaps else self.prompt
        end = max(self.prompt, self._end())
        mask, ids = canvas.mask_token_id, canvas.ids[0, start:end].tolist()
        steps, logprobs = canvas.step[0, start:end].tolist(), canvas.logprob[0, start:end].tolist()
        again = self.again[start:end].tolist()
        size = self.options.block_length if mode == "diffusion" else None
        tokens = [
            Piece(
                text,
                step,
                logprob,
                undecided=ids[n] == mask,
                opens=bool(size and n and (start + n) % size == 0),
                # A forward writes the drafts that it accepts, and one token after them.
                drafted=mode == "speculative" and steps[n + 1 : n + 2] == [step],
                again=again[n],
            )
            for n, (text, step, logprob) in enumerate(
                zip(draw_tokens(self.checkpoint.tokenizer, ids, mask), steps, logprobs, strict=True)
            )
        ]
        decided = sum(step > 0 for step in steps)
        pieces = [*self._given_pieces(tokens, start), *tokens[self.prompt - start :]]
        return State(mode, pieces, int(canvas.forwards[0]), decided, self.seconds)

    def _end(self) -> int:
        canvas, total = self.canvas, int(self.canvas.total[0])
        if self.done:
            return int(canvas.end[0])
        if self.options.mode != "diffusion":
            return self.prompt + len(canvas.new_ids(0))
        if self.options.block_length:
            return min(total, int(canvas.start[0]) + self.options.block_length)
        return total

    def _given_pieces(self, tokens: list[Piece], start: int) -> Iterator[Piece]:
        """The prompt: its texts as they were written, and the tokens of its gaps."""
        taken = 0
        for number, segment in enumerate(self.segments):
            if isinstance(segment, str):
                yield Piece(segment)
                continue
            gap = [tokens[place - start] for place in self.gaps[taken : taken + segment]]
            taken += segment
            if self.segments[number - 1].endswith(" "):
                gap[0] = replace(gap[0], text=gap[0].text.removeprefix(" "))
            if self.segments[number + 1].startswith(" "):
                gap[-1] = replace(gap[-1], text=gap[-1].text.removesuffix(" "))
            yield from gap


def stream(
    checkpoint: Checkpoint, prompt: str, images: Sequence[Any] = (), **settings: Any
) -> Iterator[tuple[str, Completion | None]]:
    """Complete one prompt, yielding (part of the text, None) as `Writing.parts`; at last ("", the
    completion).

    Raises:
        Ar2DiffError: as `complete_all`.
    """
    writing = Writing.of_prompt(checkpoint, prompt, settings, images)
    for part in writing.parts():
        yield part, None
    yield "", writing.result()


def with_ar_beside(
    begun: Callable[[dict[str, Any]], Writing], settings: dict[str, Any]
) -> list[Writing]:
    """A text with some settings, and what the AR mode writes in its place.

    Args:
        begun: begins the text with settings.
    """
    others = {*DENOISING, "draft_length", "draft_nodes"}
    shared = {name: value for name, value in settings.items() if name not in others}
    return [begun(settings), begun({**shared, "mode": "ar"})]


def in_turn(writings: Sequence[Writing]) -> Iterator[None]:
    """Write several texts, yielding after each forward. The next forward is of the one that has
    taken the least time, so that they go on at the speeds that they have alone."""
    left = list(writings)
    while left:
        first = min(left, key=lambda writing: writing.seconds)
        if first.step():
            yield
        else:
            left.remove(first)
