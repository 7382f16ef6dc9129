"""Soft control: a user's function that scores tokens while they are chosen.

This file is copied into converted folders: it imports torch and its neighbours alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .errors import Ar2DiffError, first_line, option
from .samplers import Context


def guided(
    guide: Callable[[Tensor, Tensor, Tensor], Any], context: Context, scores: Tensor
) -> Tensor:
    """Scores [N, V] with what the guide adds to them.

    Args:
        guide: as of `Options.guide`.

    Raises:
        Ar2DiffError: the guide raises, or returns anything but numbers below infinity of the shape
            that it was given.
    """
    try:
        added = guide(scores.log_softmax(-1), context.ids, context.position)
        if isinstance(added, Tensor):
            added = added.to(scores)
    except Exception as error:
        raise Ar2DiffError(
            f"{option('guide')} failed: {type(error).__name__}: {first_line(error)}",
            "correct the function; it is called with log-probabilities [N, V], tokens [N, L] and "
            "positions [N]",
        ) from error
    if not isinstance(added, Tensor) or added.shape != scores.shape:
        got = f"a tensor {[*added.shape]}" if isinstance(added, Tensor) else type(added).__name__
        raise Ar2DiffError(
            f"{option('guide')} returned {got}", f"return a tensor {[*scores.shape]} of scores"
        )
    found = scores + added
    left = found.isfinite().any(-1)
    if context.tentative is not None:
        left = left | context.tentative
    if not bool((added < torch.inf).all() & left.all()):  # NaN is not below it
        raise Ar2DiffError(
            f"{option('guide')} returned scores that are no numbers or infinite, or that leave no "
            "token",
            "return finite scores, or minus infinity for tokens that are out of the question",
        )
    return found
