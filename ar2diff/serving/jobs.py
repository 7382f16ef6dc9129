"""A row that is to be written, checked before the engine sees it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from ..checkpoint.model import Checkpoint
from ..core.canvas import Canvas, Finished
from ..core.generate import canvas_of
from ..core.options import Options
from ..core.spec import Spec
from ..generation.complete import constrained, settings_of
from ..generation.prompts import Segments
from .text import Stops


@dataclass(frozen=True, eq=False)
class Job:
    """A row for the engine. Nothing that is wrong with its request is left to be found.

    Attributes:
        ids: of the prompt, with masks in its gaps.
        canvas: of one row, with its constraint.
        spec, options: of `settings_of`.
        segments: the prompt that the row holds, if it has gaps.
        number: how many earlier rows of its request have the same prompt, which its draws depend
            on: row `number` is what `generate` writes into it for `num_return_sequences` rows.
        streams: whether its reader wants tokens as they are decided, not only the text in the end.
        drafts: whether it wants drafts, too.
        stops: says of a row and its ids whether a stop string ends them; None: there is none.
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
) -> Job:
    """A job, from token ids and the options of `generate`. It may take seconds, while the automaton
    of a constraint is made; called by any thread.

    Args:
        segments: what the ids encode, if they have gaps.
        alternatives: how many of the likeliest tokens are told with each.

    Raises:
        Ar2DiffError: an option is wrong, the prompt does not fit, or no text that matches the
            constraint does.
    """
    segments = segments if segments and len(segments) > 1 else []
    gaps = bool(segments)
    spec, options = settings_of(checkpoint, settings, gaps)
    canvas = canvas_of(checkpoint.model, spec, [ids], options)
    canvas.alternatives = alternatives
    constrained(checkpoint, options, canvas, [segments] if gaps else None)
    texts = options.stop_strings
    stops = Stops(checkpoint.tokenizer, texts, len(ids)) if texts else None
    return Job(ids, canvas, spec, options, segments, number, streams, drafts, stops)
