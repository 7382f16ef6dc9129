"""A report in one small table, as Markdown: what model cards show."""

from __future__ import annotations

import re
from pathlib import Path, PurePath
from typing import Any

from .figures import FILE, Figure, Report, read_report
from .pairs import TIMES, quality_at, written
from .sentences import claims, not_measured
from .words import label, name_of, quantity, with_error

MOST = 3  # metrics of quality that fit beside the speeds


def find_report(folder: Path) -> Report | None:
    """The report on the model in a folder: in the folder, in `report` in it, or beside it where
    `ar2diff report` writes it by default; None if there is none.

    Raises:
        Ar2DiffError: it is damaged, or a figure would mislead.
    """
    beside = folder.resolve().with_name(f"{folder.resolve().name}-report")
    for place in (folder, folder / "report", beside):
        if (place / FILE).is_file():
            return read_report(place / FILE)
    return None


def renamed(report: Report, model: str, base: str | None) -> Report:
    """The report with names that mean something elsewhere: folders become their last parts.

    Args:
        model: what it is called. base: likewise, if it has a name elsewhere.
    """
    names = {key: PurePath(subject.name).name for key, subject in report.subjects.items()}
    names |= {"model": model, "base": base or "its base"}
    subjects = {
        key: subject.model_copy(update={"name": names[key]})
        for key, subject in report.subjects.items()
    }
    return report.model_copy(update={"subjects": subjects})


def markdown(report: Report) -> dict[str, Any]:
    """What a card shows of a report.

    Returns:
        `sentences`, a line each; `table`, its lines; `missing`, what was not measured; and where
        and when it was measured, in `place`.
    """
    heads, rows = summary(report)
    lines = [heads, ["---"] + ["---:"] * (len(heads) - 1), *rows]
    hardware, versions = (report.protocol.get(part) or {} for part in ("hardware", "versions"))
    place = [str(report.protocol.get("when", ""))[:10]]
    place += [f"with ar2diff {versions['ar2diff']}"] if "ar2diff" in versions else []
    machine = [hardware.get("gpu"), hardware.get("processor")]
    place += [f"on {found}" for found in machine if found][:1]
    return {
        "seen": bool(report.seen),
        "sentences": [_escaped(claim.first) for claim in claims(report).values()],
        "table": ["| " + " | ".join(map(_escaped, line)) + " |" for line in lines],
        "missing": [_escaped(f"{item.question}: {item.what}") for item in not_measured(report)],
        "place": _escaped(" ".join(part for part in place if part)),
    }


def summary(report: Report) -> tuple[list[str], list[list[str]]]:
    """The headings and the rows of the table: speed at the smallest and at the largest batch, and
    what was written judged, for each setting."""
    timed = [f for f in report.of("speed", TIMES["speed"]) if "batch" in f.at]
    batches = sorted({figure.at["batch"] for figure in timed})
    batches = batches[:1] + batches[1:][-1:]
    metrics = written(report)[:MOST]
    judged = [f for metric in metrics for f in report.of("quality", metric)]
    pairs = dict.fromkeys((f.subject, f.setting) for f in [*timed, *judged])
    units = {metric: report.of("quality", metric)[0].unit for metric in metrics}
    heads = ["setting", *(f"tokens/s at batch {batch}" for batch in batches)]
    heads += [f"{name_of(metric)} ({units[metric]})" for metric in metrics]
    order = list(report.subjects)
    rows = []
    for subject, setting in sorted(pairs, key=lambda pair: order.index(pair[0])):
        speeds = [
            next((f for f in timed if (f.subject, f.setting, f.at["batch"])
                  == (subject, setting, batch)), None)
            for batch in batches
        ]  # fmt: skip
        marks = [quality_at(report, metric, subject, setting) for metric in metrics]
        rows.append([label(subject, setting), *map(_cell, [*speeds, *marks])])
    return heads, rows


def _cell(figure: Figure | None) -> str:
    if figure is None:
        return "–"
    text, apart = with_error(figure.value, figure.error), figure.difference
    if apart is None:
        return text
    if apart.ratio:
        return f"{text} ({with_error(apart.value, apart.error)} x {apart.to})"
    return f"{text} ({quantity(apart.value, apart.error, sign=True)} to {apart.to})"


def _escaped(text: str) -> str:
    """A text in one line of Markdown."""
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", " ".join(text.split()))
