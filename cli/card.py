"""`ar2diff card`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .output import quiet
from .push import BASE, IMAGE, LICENSE, PROMPT


def card(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder that ar2diff wrote.")],
    base: Annotated[str | None, BASE] = None,
    license: Annotated[str | None, LICENSE] = None,
    prompt: Annotated[str | None, PROMPT] = None,
    image: Annotated[Path | None, IMAGE] = None,
) -> None:
    """Print the model card that 'push' would publish; needs no token and no network.

    Example: ar2diff card runs/demo
    """
    quiet()
    from ..hub.push import preview

    text = preview(folder, base=base, license=license, prompt=prompt, image=image, tell=note)
    typer.echo(text, nl=False)


def note(text: str) -> None:
    """Say something besides the card."""
    typer.secho(f"[{text}]", err=True, dim=True)
