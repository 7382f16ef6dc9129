"""`ar2diff push`."""

from __future__ import annotations

import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .output import AsJson, quiet, report

if TYPE_CHECKING:
    from ..hub.push import Pushed

BASE = typer.Option(
    metavar="REPO", help="Hub id of the model's base, if the base was a local folder."
)
LICENSE = typer.Option(
    metavar="ID", help="License identifier from the Hub's list.", show_default="the base's"
)
PROMPT = typer.Option(
    help="Prompt for the example on the card, whose answer is compared.",
    show_default="beginnings of texts that the run held out",
)

IMAGE = typer.Option(
    metavar="FILE",
    help="Picture for the example on the card of a vision-language model; a small copy of it is "
    "published.",
    show_default="one that is drawn; never one of the data",
)


def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder that ar2diff wrote.")],
    repo: Annotated[
        str,
        typer.Argument(
            help="Repository, as USER/NAME; USER defaults to the owner of the token.",
        ),
    ],
    private: Annotated[
        bool, typer.Option("--private", help="Make the repository private.")
    ] = False,
    base: Annotated[str | None, BASE] = None,
    license: Annotated[str | None, LICENSE] = None,
    prompt: Annotated[str | None, PROMPT] = None,
    image: Annotated[Path | None, IMAGE] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Show the files and the card, but change nothing. Needs no token and no network.",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Publish a model or an adapter on the Hub, then download it and compare the two.

    The model card is what 'card' prints, unless DIR has a README.md. Other files in the repository
    are kept.

    Example: ar2diff push runs/demo user/stories --dry-run
    """
    result = publish(
        folder, repo, private=private, base=base, license=license, prompt=prompt, image=image,
        dry_run=dry_run,
    )  # fmt: skip
    if as_json:
        report({"dry_run": dry_run, **asdict(result)}, True)
    elif dry_run:
        typer.echo(f"these files would be pushed to {result.repository}:")
        for path, size in result.files.items():
            typer.echo(f"{size:14,}  {path}")
        for path in result.removed:
            typer.echo(f"{'removed':>14}  {path}")
        for note in result.notes:
            typer.echo(f"note: {note}")
        typer.echo(f"\n{result.card}")
    else:
        state = "is now at" if result.changed else "was already at"
        typer.echo(f"{result.url} {state} {result.commit}")
        typer.echo(
            f"downloaded and compared: the logits differ by {result.difference:.1e} of the "
            f"largest, and the {result.tokens} tokens of the example are the same"
        )


def publish(folder: Path, repo: str, **options: Any) -> Pushed:
    """Push, with progress on stderr."""
    if sys.stderr.isatty():  # progress bars of the upload
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "0")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    quiet()
    from .. import push as run

    return run(
        folder, repo, tell=lambda line: typer.secho(f"[{line}]", err=True, dim=True), **options
    )
