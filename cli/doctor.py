"""`ar2diff doctor`."""

from __future__ import annotations

from .output import AsJson, quiet, report


def doctor(as_json: AsJson = False) -> None:
    """Show what this machine has: versions, accelerator, disk space, Hub, and possible problems.

    Example: ar2diff doctor
    """
    quiet()
    from dataclasses import asdict

    from ..doctor import examine

    machine = asdict(examine())
    if not as_json:
        machine["warnings"] = "; ".join(machine["warnings"]) or "none"
    report(machine, as_json)
