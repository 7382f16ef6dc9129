"""`ar2diff config`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from .output import Overrides, RecipeArgument, as_yaml
from .usage import Group, Verb

config_app = typer.Typer(
    cls=Group, help="Explain, resolve and check recipes.", no_args_is_help=True
)


@config_app.command(cls=Verb)
def schema(
    section: Annotated[
        str | None,
        typer.Argument(help="Show only this section, for example train.", show_default="all"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON schema.")] = False,
) -> None:
    """Print each recipe key with its type, default and meaning.

    Example: ar2diff config schema train
    """
    from ..config.recipe import Recipe
    from ..config.schema import describe_fields
    from ..core.errors import Ar2DiffError, nearest, shortened

    names = list(Recipe.model_fields)
    if section is not None and section not in names:
        raise Ar2DiffError(
            f"a recipe has no section {shortened(section)}{nearest(section, names)}",
            f"choose one of {', '.join(names)}",
        )
    if as_json:
        typer.echo(json.dumps(Recipe.model_json_schema()))
        return
    for name, kind, default, description in describe_fields(Recipe):
        if section in (None, name.split(".")[0]):
            typer.echo(f"{name:40} {kind:34} {as_yaml(default):12} {description}".rstrip())


@config_app.command(cls=Verb)
def show(recipe: RecipeArgument, overrides: Overrides = None) -> None:
    """Print a recipe as a run would resolve it, with every default.

    Example: ar2diff config show demo train.learning_rate=1e-3
    """
    from ..config.recipe import dump_recipe, load_recipe

    typer.echo(dump_recipe(load_recipe(recipe, overrides or [])), nl=False)


@config_app.command(cls=Verb)
def validate(recipe: RecipeArgument, overrides: Overrides = None) -> None:
    """Check that a recipe is valid.

    Example: ar2diff config validate my.yaml train.learning_rate=1e-3
    """
    from ..config.recipe import load_recipe

    load_recipe(recipe, overrides or [])
    typer.echo(f"{recipe}: valid")
