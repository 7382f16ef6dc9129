"""`ar2diff config`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from .usage import Group

config_app = typer.Typer(cls=Group, help="Explain the keys of a recipe.", no_args_is_help=True)


@config_app.callback()
def _group() -> None:
    """Explain the keys of a recipe."""


@config_app.command()
def schema(
    section: Annotated[
        str | None, typer.Argument(help="Show only this section, for example train. [default: all]")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON schema.")] = False,
) -> None:
    """Print each recipe key with its type, default and meaning.

    Example: ar2diff config schema train
    """
    from ..config.recipe import Recipe
    from ..config.schema import describe_fields
    from ..core.errors import Ar2DiffError, nearest, shortened
    from .output import as_yaml

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
