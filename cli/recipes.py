"""`ar2diff recipes`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .usage import Group

recipes_app = typer.Typer(
    cls=Group, help="List, show, copy and check recipes.", no_args_is_help=True
)


@recipes_app.command()
def ls(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List the recipes that ship with ar2diff.

    Example: ar2diff recipes ls
    """
    from ..config.recipe import load_recipe, recipe_names
    from .output import report

    described = {name: load_recipe(name).description for name in recipe_names()}
    if as_json:
        report(described, True)
    else:
        width = max(map(len, described))
        for name, description in described.items():
            typer.echo(f"{name:{width}} {description}")


@recipes_app.command()
def show(
    recipe: Annotated[str, typer.Argument(help="Name of a recipe, or a .yaml file.")],
    resolved: Annotated[bool, typer.Option("--resolved", help="Include every default.")] = False,
) -> None:
    """Print a recipe.

    Example: ar2diff recipes show demo
    """
    from ..config.recipe import dump_recipe, load_recipe, recipe_text

    typer.echo(dump_recipe(load_recipe(recipe)) if resolved else recipe_text(recipe), nl=False)


@recipes_app.command()
def cp(
    recipe: Annotated[str, typer.Argument(help="Name of a recipe.")],
    target: Annotated[Path, typer.Argument(help="File or folder to copy it to.")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be written, but write nothing.")
    ] = False,
) -> None:
    """Copy a recipe to a file that you can edit.

    Example: ar2diff recipes cp demo my.yaml
    """
    from ..config.recipe import recipe_text
    from ..core.errors import Ar2DiffError

    text = recipe_text(recipe)
    try:
        if target.is_dir():
            target = target / f"{recipe}.yaml"
        if target.exists():
            raise Ar2DiffError(
                f"{target} already exists", "choose another name, or remove the file"
            )
        if not dry_run:
            target.write_text(text, encoding="utf-8")
    except OSError as error:
        raise Ar2DiffError(
            f"{target} cannot be written: {error.strerror}", "choose another file"
        ) from None
    typer.echo(f"{'would write' if dry_run else 'wrote'} {target}")


@recipes_app.command()
def validate(
    recipe: Annotated[str, typer.Argument(help="Name of a recipe, or a .yaml file.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
) -> None:
    """Check that a recipe is valid.

    Example: ar2diff recipes validate my.yaml train.learning_rate=1e-3
    """
    from ..config.recipe import load_recipe

    load_recipe(recipe, overrides or [])
    typer.echo(f"{recipe}: valid")
