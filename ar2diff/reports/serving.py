"""The command that serves a model as a report found it best."""

from __future__ import annotations

import shlex

from .figures import AR, Figure, Report
from .pairs import TIMES
from .subjects import LOSSLESS, LOSSLESS_CHAIN, LOSSLESS_TREE

SAME_TEXT = (AR, LOSSLESS, LOSSLESS_CHAIN, LOSSLESS_TREE)  # settings that write the AR mode's text
OWN = ("mode", "draft_length", "draft_nodes")  # what distinguishes them


def serve_command(report: Report | None, name: str) -> str:
    """`ar2diff serve NAME`. Without flags, requests get the folder's own settings. Of several that
    write the same text the command names the one that was the fastest at the largest batch, if
    it was faster than the folder's own by more than two standard errors.

    Args:
        name: of the model, a folder or a Hub id.
    """
    timed = [] if report is None else report.of("speed", TIMES["speed"])
    timed = [f for f in timed if f.subject == "model" and f.setting in SAME_TEXT]
    most = max((f.at.get("batch", 0) for f in timed), default=0)
    at_most = {f.setting: f for f in timed if f.at.get("batch") == most}
    own, best = at_most.get(LOSSLESS), max(at_most.values(), key=_speed, default=None)
    flags: list[str] = []
    if own is not None and best is not own and best.value - own.value > 2 * _error(best, own):
        options = report.settings[best.setting]
        flags = [f"--{n.replace('_', '-')} {options[n]}" for n in OWN if n in options]
    return " ".join(["ar2diff serve", shlex.quote(name), *flags])


def _speed(figure: Figure) -> float:
    return figure.value


def _error(first: Figure, second: Figure) -> float:
    return ((first.error or 0.0) ** 2 + (second.error or 0.0) ** 2) ** 0.5
