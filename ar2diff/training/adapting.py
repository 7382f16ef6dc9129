"""What `adapt` refuses, and what it measures at the end, whatever its rows are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..config.recipe import Recipe, with_values
from ..core.errors import Ar2DiffError, option
from ..core.spec import Spec
from ..evaluation.quality import choose_threshold
from .plan import Plan, check_kind


def check(path: Path, spec: Spec | None, recipe: Recipe) -> Recipe:
    """Refuse own text of a model that cannot write any, and what a control cannot use. The AR loss
    of a control is all of its loss."""
    if recipe.objective.kind == "ar":
        check_kind(path, spec, recipe)
        for name in recipe.noise.of_adapt:
            raise Ar2DiffError(
                f"{option(name)} cannot be used with {option('objective.kind', 'ar')},"
                " which masks no tokens",
                f"leave out {option(name)}",
            )
        recipe = with_values(recipe, objective={"ar_weight": 1.0})
    if recipe.data.self is not None and spec is not None and not spec.ar_mode:
        raise Ar2DiffError(
            f"model {path} has no AR mode, in which it could write its own text",
            f"leave out {option('data.self')}, and give {option('data', 'FILE')}",
        )
    return recipe


def measure(plan: Plan) -> dict[str, Any]:
    """How good the text of a whole model without an AR mode is, which decides its threshold."""
    checkpoint = plan.checkpoint
    spec = checkpoint.spec_or_causal
    if spec.lossless or spec.noise.free or checkpoint.base is not None:
        return {}
    rows = plan.eval_rows if plan.recipe.eval.steps else []  # where an evaluation was asked for
    return {"text": choose_threshold(checkpoint, checkpoint.path, rows)}
