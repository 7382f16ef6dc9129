"""`ar2diff doctor`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .output import AsJson, quiet, report

if TYPE_CHECKING:
    from ..doctor import Package


def doctor(as_json: AsJson = False) -> None:
    """Show what this machine has: versions of libraries and whether they were tested, accelerator,
    disk space, Hub, and possible problems.

    Example: ar2diff doctor
    """
    quiet()
    from dataclasses import asdict

    from ..doctor import examine

    found = examine()
    machine = asdict(found)
    if as_json:
        for name, package in found.packages.items():
            machine["packages"][name]["state"] = package.state
    else:
        machine["packages"] = {name: _told(package) for name, package in found.packages.items()}
        machine["warnings"] = "; ".join(machine["warnings"]) or "none"
    report(machine, as_json)


def _told(package: Package) -> str:
    """A library in one line."""
    tested = f"{package.requires}, tested up to {package.newest}"
    if package.version is None:
        extra = f"; pip install 'ar2diff[{package.extra}]'" if package.extra else ""
        return f"not installed ({tested}){extra}"
    state = {"tested": "ok", "newer": "newer than tested", "unsupported": "NOT SUPPORTED"}
    return f"{package.version}, {state[package.state]} ({tested})"
