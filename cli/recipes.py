"""`ar2diff recipes`."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from .output import RecipeArgument
from .usage import Group, Verb

NARROW = 24  # characters that a description needs to say anything

recipes_app = typer.Typer(
    cls=Group, help="List, show and copy the recipes that ship with ar2diff.", no_args_is_help=True
)


@recipes_app.command(cls=Verb)
def ls(
    run: Annotated[
        bool, typer.Option("--run", help="List only recipes that were run and measured.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the recipes that ship with ar2diff: the verb that uses them, the model and hardware that
    they are meant for, and whether they were run and measured.

    Example: ar2diff recipes ls --run
    """
    from ..config.catalogue import catalogue
    from .output import report

    found = {name: entry for name, entry in catalogue().items() if entry.measured or not run}
    if as_json:
        report({name: asdict(entry) for name, entry in found.items()}, True)
        return
    rows = [("recipe", "verb", "model", "hardware", "measured", "description")]
    for name, entry in found.items():
        measured = "yes" if entry.measured else "no"
        rows.append((name, entry.verb, entry.model, entry.hardware, measured, entry.description))
    for line in aligned(rows, shutil.get_terminal_size().columns if sys.stdout.isatty() else None):
        typer.echo(line)


def aligned(rows: Sequence[tuple[str, ...]], columns: int | None) -> list[str]:
    """A table without rules. Its last column is cut at the width of the terminal, and left out of a
    narrow one.

    Args:
        columns: of the terminal; None: any number.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)][:-1]
    left = None if columns is None else columns - sum(widths) - 2 * len(widths)
    lines = []
    for *cells, last in rows:
        if left is not None and len(last) > left:
            last = f"{last[: left - 1]}…" if left >= NARROW else ""
        padded = [f"{cell:{width}}" for cell, width in zip(cells, widths, strict=True)]
        lines.append("  ".join([*padded, last]).rstrip())
    return lines


@recipes_app.command(cls=Verb)
def show(
    recipe: RecipeArgument,
) -> None:
    """Print the file of a recipe, with its comments.

    Example: ar2diff recipes show demo
    """
    from ..config.recipe import recipe_text

    typer.echo(recipe_text(recipe), nl=False)


@recipes_app.command(cls=Verb)
def cp(
    recipe: RecipeArgument,
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
