"""What finishes an answer, besides an end token: stop strings, time limits, criteria.

This file is copied into converted folders: it imports torch, transformers and its neighbours alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor
from transformers.generation.stopping_criteria import MaxTimeCriteria, StopStringCriteria

from .canvas import Finished
from .constraint import Constraint
from .errors import Ar2DiffError, option
from .grammar import Grammar
from .options import Options


def finished_of(
    model: Any,
    options: Options,
    given: Any,
    tokenizer: Any,
    padding: Sequence[int] | None = None,
    constraint: Constraint | Grammar | None = None,
) -> Finished | None:
    """Stop strings, the time limit and stopping criteria, asked for each new token in turn; None if
    there are none.

    Args:
        given: stopping criteria of transformers, or None.
        tokenizer: for stop strings.
        padding: tokens of padding in each row's prompt, which a criterion may count; None: none.
        constraint: stop strings end a text only where it matches.

    Raises:
        Ar2DiffError: stop strings without a tokenizer.
    """
    criteria = list(given or [])
    stops = None
    if options.stop_strings:
        if tokenizer is None:
            raise Ar2DiffError(
                f"{option('stop_strings')} needs a tokenizer", f"pass {option('tokenizer')}"
            )
        stops = StopStringCriteria(tokenizer, list(options.stop_strings))
        if constraint is None:
            criteria.append(stops)
    if options.max_time is not None:
        criteria.append(MaxTimeCriteria(options.max_time))
    if not criteria and stops is None:
        return None
    rows = len(padding or ())
    own = [[_of_row(criterion, row, rows) for criterion in criteria] for row in range(rows)]

    def finished(row: int, ids: Tensor) -> bool:
        written = len(ids)
        pads = ids.new_full((padding[row] if padding else 0,), options.filler)
        ids = torch.cat([pads, ids])[None].to(model.device)
        asked = [*(own[row] if rows else criteria)]
        if constraint is not None and stops and constraint.whole(row, written):
            asked.append(stops)
        return any(bool(torch.as_tensor(criterion(ids, None)).all()) for criterion in asked)

    return finished


def _of_row(criterion: Any, row: int, rows: int) -> Any:
    """A criterion for a single row. If it keeps flags for each row of a batch, as lm-eval's do, it
    gets those of that row."""
    own = copy(criterion) if rows > 1 else criterion
    for name, value in vars(own).items() if rows > 1 else ():
        if isinstance(value, list) and [type(flag) for flag in value] == [bool] * rows:
            setattr(own, name, value[row : row + 1])
    return own
