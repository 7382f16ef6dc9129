"""What a recipe means for a base that is a masked language model (BERT, RoBERTa, ModernBERT ...):
full attention, each token predicted at its own slot, and nothing that takes an AR mode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..checkpoint.files import is_adapter, read_config
from ..config.recipe import Recipe, with_values
from ..core.errors import Ar2DiffError, option
from ..core.masked_lm import is_masked_lm
from ..core.spec import Spec

GOAL = {"attention": "full", "block_length": None, "prediction": "same"}


def for_masked_lm(path: Path, spec: Spec | None, recipe: Recipe) -> Recipe:
    """The recipe as it is for any other model; for a masked language model with what it leaves open
    decided: full attention, and prediction in place.

    Args:
        spec: None if the model is not converted.

    Raises:
        Ar2DiffError: it asks a masked language model for what only an AR model has.
    """
    if is_adapter(path) or not is_masked_lm(read_config(path).get("architectures")):
        return recipe
    for name, value, why in _needs(spec, recipe):
        named = option(name) if value is None else option(name, value)
        raise Ar2DiffError(
            f"{named} cannot be used with model {path}, a masked language model: {why}",
            "use an autoregressive base, or leave it out",
        )
    if spec is not None:
        return recipe
    chosen = recipe.convert.model_fields_set
    return with_values(recipe, convert={k: v for k, v in GOAL.items() if k not in chosen})


def _needs(spec: Spec | None, recipe: Recipe) -> list[tuple[str, Any, str]]:
    """(key, its value, why not) for everything that takes an AR model."""
    convert, objective, anneal = recipe.convert, recipe.objective, recipe.anneal
    asked = {name: getattr(convert, name) for name in GOAL if name in convert.model_fields_set}
    why = "it reads in both directions, and predicts each token at its own position"
    found = [
        (f"convert.{name}", value, why) for name, value in asked.items() if value != GOAL[name]
    ]
    if "ar_weight" in objective.model_fields_set and objective.ar_weight:
        found.append(("objective.ar_weight", objective.ar_weight, "it has no AR mode to keep"))
    if anneal.kind != "none":
        found.append(("anneal.kind", anneal.kind, "it has no causal attention to begin with"))
    if objective.kind == "ar":
        found.append(("objective.kind", "ar", "it has no AR mode to train"))
    if objective.distil is not None:
        found.append(
            ("objective.distil", objective.distil.target, "it has no AR mode to learn from")
        )
    if recipe.data.self is not None:
        found.append(("data.self", None, "it has no AR mode that could write text"))
    if recipe.draft is not None:
        found.append(("draft", None, "it has no AR mode that could verify drafts"))
    return found
