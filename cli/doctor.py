"""`ar2diff doctor`."""

from __future__ import annotations

from .output import AsJson, quiet, report


def doctor(as_json: AsJson = False) -> None:
    """Look at this machine: versions, accelerator, memory, disk, Hub, stray settings.

    Example: ar2diff doctor
    """
    quiet()
    from ..doctor import examine

    report(examine(), as_json)
