"""One thing that goes wrong with a case."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import checkpoints
import commandlines
import datafiles

if TYPE_CHECKING:
    from cases import Case


def mutate(case: Case, draw: random.Random) -> str:
    """Do one thing; "" where it does not fit this case."""
    folders = [r for r in ("model", "base", "adapter") if r in case.files]
    kinds: list[tuple[int, Callable[..., str], Any]] = [(3, commandlines.arguments, None)]
    kinds += [(8, checkpoints.folder, case.files[role]) for role in folders]
    kinds += [(4, datafiles.row_file, case.files["rows"])] if "rows" in case.files else []
    kinds += [(6, commandlines.recipe_file, case.files["recipe"])] if "recipe" in case.files else []
    kinds += [(6, commandlines.said, None)] if case.verb == "chat" else []
    if case.verb in ("adapt", "sft", "rl", "memory", "config"):
        kinds.append((2, commandlines.override, None))
    _, act, target = draw.choices(kinds, [weight for weight, _, _ in kinds])[0]
    note = act(case, draw, target)
    return f"{act.__name__}: {note}" if note else ""
