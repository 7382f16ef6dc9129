"""`ar2diff doctor`."""

from __future__ import annotations

from typing import Annotated

import typer

from .output import HELP_JSON, quiet, report


def doctor(as_json: Annotated[bool, typer.Option("--json", help=HELP_JSON)] = False) -> None:
    """Look at this machine: versions, accelerator, memory, disk, Hub, stray settings.

    Example: ar2diff doctor
    """
    quiet()
    from ..doctor import examine

    report(examine(), as_json)
