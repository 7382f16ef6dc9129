"""A row that is to be written, checked before the engine sees it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from ..checkpoint.model import Checkpoint
from ..core.canvas import Canvas, Finished
from ..core.images import PLACE_BITS
from ..core.options import Options
from ..core.seeds import content_key
from ..core.spec import Spec
from ..data.album import Album
from ..generation.complete import drawn, settings_of
from ..generation.prompts import Segments
from .text import Stops


@dataclass(frozen=True, eq=False)
class Job:
    """A row for the engine. Nothing that is wrong with its request is left to be found.

    Attributes:
        ids: of the prompt, with masks in its gaps and codes for its images.
        canvas: of one row, with its constraint.
        spec, options: of `settings_of`.
        segments: the prompt that the row holds, if it has gaps.
        number: how many earlier rows of its request have the same prompt, which its draws depend
            on: row `number` is what `generate` writes into it for `num_return_sequences` rows.
        streams: whether its reader wants tokens as they are decided, not only the text in the end.
        drafts: whether it wants drafts, too.
        stops: says of a row and its ids whether a stop string ends them; None: there is none.
        seen: the ids, with numbers below 0 for the features of images that no other image has.
    """

    ids: Sequence[int]
    canvas: Canvas
    spec: Spec
    options: Options
    segments: Segments = field(default_factory=list)
    number: int = 0
    streams: bool = True
    drafts: bool = False
    stops: Finished | None = None
    seen: Sequence[int] = ()

    @cached_property
    def shared(self) -> tuple[Options, bool]:
        """What rows must have in common to be written together: all options but what is a row's
        own, and whether alternatives are noted."""
        options = replace(
            self.options,
            max_new_tokens=0,
            min_new_tokens=0,
            stop_strings=(),
            seed=None,
            num_return_sequences=1,
        )
        return options, bool(self.canvas.alternatives)

    @property
    def prompt(self) -> list[int]:
        """The ids of the prompt as the tokenizer knows them, with masks in its gaps."""
        return self.canvas.ids[0, : len(self.ids)].tolist()

    @cached_property
    def names(self) -> list[int]:
        """What stands for each token of the prompt wherever its keys and values are kept: `seen`,
        but for what is read in both directions, as some models read images or whole prompts, a
        number that depends on all of it."""
        found = list(self.seen)
        for start, end in self._both_ways:
            found[start:end] = [-1 - (content_key(self.seen[start:end]) >> 2)] * (end - start)
        return found

    def known_as(self, ids: Sequence[int]) -> list[int]:
        """The names of the first tokens of the row, whose ids are given."""
        prompt = zip(self.names, ids, strict=False)
        return [*(n if n < 0 else token for n, token in prompt), *ids[len(self.names) :]]

    def uncut(self, count: int) -> int:
        """The most of the first `count` tokens that read nothing behind themselves."""
        return min([count, *(start for start, end in self._both_ways if start < count < end)])

    @cached_property
    def _both_ways(self) -> list[tuple[int, int]]:
        """Where parts of the prompt begin and end that are read in both directions."""
        sight = self.canvas.sight
        if sight is None or sight.until is None:
            return []
        until, found, at = sight.until[0].tolist(), [], 0
        while at < len(until):
            end = until[at] + 1
            if end > at + 1:
                found.append((at, end))
            at = max(end, at + 1)
        return found


def job_of(
    checkpoint: Checkpoint,
    ids: Sequence[int],
    settings: dict[str, Any],
    *,
    segments: Segments | None = None,
    number: int = 0,
    streams: bool = True,
    drafts: bool = False,
    alternatives: int = 0,
    album: Album | None = None,
) -> Job:
    """A job, from token ids and the options of `generate`. It may take seconds, while the automaton
    of a constraint is made; called by any thread.

    Args:
        segments: what the ids encode, if they have gaps.
        alternatives: how many of the likeliest tokens are told with each.
        album: of the images that the ids have codes of.

    Raises:
        Ar2DiffError: an option is wrong, the prompt does not fit, or no text that matches the
            constraint does.
    """
    segments = segments if segments and len(segments) > 1 else []
    gaps = bool(segments)
    spec, options = settings_of(checkpoint, settings, gaps)
    canvas = drawn(checkpoint, spec, options, [ids], [segments] if gaps else None, album)
    canvas.alternatives = alternatives
    texts = options.stop_strings
    stops = Stops(checkpoint.tokenizer, texts, len(ids)) if texts else None
    names = _named(ids, album)
    return Job(ids, canvas, spec, options, segments, number, streams, drafts, stops, names)


def _named(ids: Sequence[int], album: Album | None) -> list[int]:
    """Ids with a hash of an image's pixels and of the feature's place for each code: the key in a
    code has so few bits that somebody could find an image with the key of another one."""
    if album is None:
        return list(ids)
    found = []
    for token in ids:
        if token < 0:
            key, place = divmod(-1 - token, 1 << PLACE_BITS)
            digest = album.shots.content(key)
            halves = (int.from_bytes(digest[n : n + 8], "little", signed=True) for n in (0, 8))
            token = -1 - (content_key([*halves, place]) >> 2)
        found.append(token)
    return found
