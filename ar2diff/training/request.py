"""Resolving what a caller asks of a training verb: recipe, data and output folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config.recipe import Recipe, load_recipe, recipe_names, with_values
from ..core.errors import Ar2DiffError, option


@dataclass(frozen=True)
class Request:
    """A requested run: model (folder or Hub id), resolved recipe and output folder."""

    model: str
    recipe: Recipe
    output_dir: Path

    @property
    def lacks_data(self) -> bool:
        """Whether the run would train, but names no data."""
        data = self.recipe.data
        return bool(self.recipe.train.max_steps) and not data.sources and data.self is None


def requested(
    verb: str,
    model: str | Path,
    recipe: Recipe | str | Path | None = None,
    output_dir: str | Path | None = None,
    *,
    data: str | Path | Sequence[str | Path] | None = None,
    text_field: str | None = None,
    max_steps: int | None = None,
    overrides: Mapping[str, Any] | Sequence[str] = (),
) -> Request:
    """Resolve the arguments of a training verb, which are those of `adapt`.

    Raises:
        Ar2DiffError: an unknown recipe or key, a value of the wrong type, values that contradict
            each other, or a recipe or setting where the model should be.
    """
    model = str(model)
    _check_model(model)
    if isinstance(overrides, Mapping):  # JSON is YAML, which is what a value is read as
        overrides = [f"{key}={json.dumps(value)}" for key, value in overrides.items()]
    settings = list(overrides)
    if max_steps is not None:
        settings.append(f"train.max_steps={max_steps}")
    if isinstance(recipe, Path):
        recipe = str(recipe)
    if verb == "draft" and recipe is None:
        recipe = "draft"  # whose learning rate is another than the default
    plan = load_recipe(recipe, settings)
    if verb == "draft" and plan.draft is None:
        plan = with_values(plan, draft={})
    values: dict[str, Any] = {}
    if data is not None and len(data := [data] if isinstance(data, str | Path) else data):
        known = {source.path: source for source in plan.data.sources}
        paths = [str(path) for path in data]
        # A source that is also in the recipe keeps its weight and other settings.
        values["sources"] = [known[p].model_dump() if p in known else {"path": p} for p in paths]
    if text_field is not None:
        values["text_field"] = text_field
    if values:
        plan = with_values(plan, data=values)
    if output_dir is None:
        stem = model.rstrip("/").split("/")[-1].partition("@")[0]
        output_dir = Path("runs") / f"{stem}-{plan.convert.attention if verb == 'adapt' else verb}"
    return Request(model, plan, Path(output_dir))


def _check_model(model: str) -> None:
    """Refuse what is meant to be something else: the model was forgotten."""
    if Path(model[:200]).is_dir():
        return
    if model.endswith((".yaml", ".yml")) or model in recipe_names():
        raise Ar2DiffError(
            f"{model} is a recipe, not a model",
            f"give the model as the first argument, and then {option('recipe', model)}",
        )
    if "=" in model:
        raise Ar2DiffError(
            f"the first argument must be the model, but {model} is a setting",
            "give the folder or Hub id of a model before it",
        )
