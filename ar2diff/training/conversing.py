"""`adapt` of a vision-language model on conversations. Their layout is that of sft, a noisy copy of
each answer, in which images stand once: a noisy copy of whole rows would hold all of them twice."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ..checkpoint.model import Checkpoint
from ..config.recipe import Recipe
from ..core.errors import Ar2DiffError, option
from ..core.spec import Spec
from ..data.conversations import Conversations
from . import adapting, sft
from .plan import Plan, Verb

DEFAULTS = {  # fields that only whole documents have a use for, with the value that asks nothing
    "anneal.kind": "none", "data.self": None, "data.cut_share": 0.0, "data.streaming": False,
}  # fmt: skip


def check(path: Path, spec: Spec | None, recipe: Recipe) -> Recipe:
    """Refuse what either verb refuses, but for a model that is not converted."""
    for key, default in DEFAULTS.items():
        section, name = key.split(".")
        if getattr(getattr(recipe, section), name) != default:
            raise Ar2DiffError(
                f"{option(key)} only works with documents, but the data are conversations",
                "leave it out",
            )
    noise = recipe.noise.process
    if spec is None and noise is not None and noise.fits:
        raise Ar2DiffError(
            f"{option('noise.kind', noise.kind)} is fitted to documents, but the data are "
            "conversations",
            "convert the model on documents first, or choose another noise",
        )
    return sft.check_settings(adapting.check(path, spec, recipe))


def make_plan(checkpoint: Checkpoint, recipe: Recipe, conversations: Conversations) -> Plan:
    """The plan of sft, and what adapt measures at the end."""
    return replace(sft.make_plan(checkpoint, recipe, conversations), measure=measure)


def measure(plan: Plan) -> dict[str, Any]:
    """As adapt measures it, if the text of the model without images can tell."""
    texts = [row for row in plan.eval_rows if min(row) >= 0]
    found = adapting.measure(replace(plan, eval_rows=texts))
    if found and len(texts) < len(plan.eval_rows):
        return {"text": {"not_measured": "the held-out conversations have images"}}
    return found


CONVERSING = Verb("adapt", check, sft.read, make_plan)
