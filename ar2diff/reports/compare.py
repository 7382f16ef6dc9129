"""Several reports as one page: recipes, checkpoints, or one model over time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..core.errors import Ar2DiffError
from .figures import QUESTIONS, Figure, Report, read_report
from .page import tables, write_page
from .pairs import TIMES, best_pair
from .plots import by_report, plots
from .sentences import claims
from .words import joined

BASE = "base"
MACHINE = {
    "hardware": "hardware is",
    "threads": "number of threads is",
    "dtype": "number type is",
    "versions": "versions are",
}  # parts of a protocol that change speeds
FEWEST = 2


def compare(reports: Sequence[str | Path], output: str | Path = "compare.html") -> Path:
    """Show several reports as one page, to compare recipes, checkpoints or machines. Returns its
    path.

    Args:
        reports: folders of reports, or their files. output: the page to write.

    Raises:
        Ar2DiffError: one cannot be read; there are fewer than two; the disk refuses.
    """
    return write([read_report(Path(path)) for path in reports], Path(output))


def write(reports: Sequence[Report], path: Path) -> Path:
    """Write one page of several reports; never half of it. Returns its path.

    Args:
        reports: of which the same one counts once.

    Raises:
        Ar2DiffError: there are fewer than two, or the disk refuses.
    """
    different = [report for n, report in enumerate(reports) if report not in reports[:n]]
    if len(different) < FEWEST:
        raise Ar2DiffError(
            "there is nothing to compare: fewer than two different reports are named",
            "name two reports or more",
        )
    named = titled(different)
    for name, report in named.items():
        if "model" not in report.subjects:
            raise Ar2DiffError(
                f"the report {name} is not of a model", "make it again with 'ar2diff report'"
            )
    every, leading = merged(named), merged(named, leading=True)
    drawn = plots(leading)
    for question, more in by_report(leading, list(named)).items():
        drawn[question] = more + drawn[question]
    return write_page(
        path,
        "compare",
        reports=named,
        questions=QUESTIONS,
        claims={name: claims(report) for name, report in named.items()},
        plots=drawn,
        tables={question: tables(every, question) for question in QUESTIONS},
        notes=list(differences(named)),
    )


def titled(reports: Sequence[Report]) -> dict[str, Report]:
    """Reports by their titles; those that have the same one are numbered."""
    titles = [report.title for report in reports]
    named = {}
    for n, (title, report) in enumerate(zip(titles, reports, strict=True)):
        alone = titles.count(title) == 1 and title != BASE
        named[title if alone else f"{title} ({titles[: n + 1].count(title)})"] = report
    return named


def merged(reports: dict[str, Report], leading: bool = False) -> Report:
    """One report whose subjects are the models of several, by their names, and the base if they
    share it.

    Args:
        leading: with one setting of each alone: the fastest of equal quality at the smallest batch.
    """
    figures: list[Figure] = []
    for name, report in reports.items():
        chosen = leading_setting(report) if leading else None
        figures += [
            figure.model_copy(update={"subject": name})
            for figure in report.figures
            if figure.subject == "model" and (chosen is None or figure.setting in (None, chosen))
        ]
    first = next(iter(reports.values()))
    subjects = {name: report.subjects["model"] for name, report in reports.items()}
    if BASE in first.subjects and not _differ(_bases(list(reports.values()))):
        subjects[BASE] = first.subjects[BASE]
        figures += [figure for figure in first.figures if figure.subject == BASE]
    settings = {n: options for report in reports.values() for n, options in report.settings.items()}
    return Report(
        title=joined(list(reports)), quick=any(report.quick for report in reports.values()),
        subjects=subjects, figures=figures, settings=settings,
    )  # fmt: skip


def leading_setting(report: Report) -> str | None:
    """The model's fastest setting of equal quality at the smallest batch; None if there is none."""
    timed = report.of("speed", TIMES["speed"], subject="model")
    batch = min((figure.at["batch"] for figure in timed if "batch" in figure.at), default=None)
    pair = None if batch is None else best_pair(report, "speed", BASE, {"batch": batch})
    if pair is not None:
        return pair[1].mine.setting
    return max(timed, key=lambda figure: figure.value).setting if timed else None


def differences(reports: dict[str, Report]) -> list[str]:
    """Why figures of the reports must not be compared, in sentences."""
    every = list(reports.values())
    said = []
    for part, words in MACHINE.items():
        if _differ([report.protocol.get(part) for report in every]):
            said.append(f"The {words} not the same in all of them, so speeds cannot be compared.")
    for part in ("data", "seed"):
        if _differ([report.protocol.get(part) for report in every]):
            said.append(f"The {part} is not the same in all of them, so their questions differ.")
    for name in sorted({name for report in every for name in report.settings}):
        if _differ([report.settings[name] for report in every if name in report.settings]):
            said.append(f"The setting {name} does not mean the same in all of them.")
    if _differ(_bases(every)):
        said.append("Their bases differ: each is compared with its own.")
    return said


def _bases(reports: Sequence[Report]) -> list[str | None]:
    return [report.subjects[BASE].name if BASE in report.subjects else None for report in reports]


def _differ(values: Sequence[Any]) -> bool:
    return any(value != values[0] for value in values)
