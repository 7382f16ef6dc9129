"""What the figures say of quality, in sentences."""

from __future__ import annotations

import math

from .claim import Claim, named
from .figures import TOKEN_BY_TOKEN, Figure, Report
from .pairs import FREE, SURE, TIMES, Apart, Verdict, apart, marks, written
from .words import joined, name_of, quantity


def quality_claim(report: Report) -> Claim:
    """The claim on quality: what is written, judged and in likelihood, against each subject."""
    metrics = written(report)
    others = [name for name in list(report.subjects)[1:]]
    sentences: dict[str, tuple[str, dict[str, Verdict]]] = {}
    for other in others:
        found = {metric: _rows_apart(report, metric, other) for metric in metrics}
        if any(found.values()):
            sentences[other] = _quality_sentence(report, other, found)
    likelihood, verdicts = _likelihood(report)
    rest = [text for other, (text, _) in sentences.items() if other != "base"]
    slowest = _token_by_token(report)
    if "base" in sentences:
        first, own = sentences["base"]
        return Claim("quality", first, [*rest, *likelihood, *slowest], own)
    if likelihood:
        return Claim("quality", likelihood[0], [*rest, *likelihood[1:], *slowest], verdicts)
    return Claim(
        "quality",
        f"The quality of {named(report)} has nothing to be compared with.",
        [*rest, *slowest],
    )


def _rows_apart(report: Report, metric: str, other: str) -> list[tuple[str | None, Apart, str]]:
    """(setting, difference, unit) of a metric at each setting of the model; from the same setting
    of another subject if it has that, else from what was recorded, or its first."""
    found = []
    theirs = marks(report, metric, subject=other)
    for mine in marks(report, metric, subject="model"):
        recorded = mine.difference
        same = [t for t in theirs if t.at == mine.at]
        alike = recorded.setting if recorded and recorded.to == other else mine.setting
        same = [t for t in same if t.setting == alike] or same
        if same and (difference := apart(mine, same[0])):
            found.append((mine.setting, difference, mine.unit))
    return found


def _quality_sentence(
    report: Report, other: str, found: dict[str, list[tuple[str | None, Apart, str]]]
) -> tuple[str, dict[str, Verdict]]:
    verdicts: dict[str, Verdict] = {}
    alike: dict[tuple[tuple[str | None, Verdict], ...], list[str]] = {}
    for metric, rows in found.items():
        verdicts |= {f"{metric}, {s}" if s else metric: a.verdict for s, a, _ in rows}
        if rows:  # metrics of which the same is to be said share a clause
            alike.setdefault(tuple((s, a.verdict) for s, a, _ in rows), []).append(metric)
    clauses = []
    for metrics in alike.values():
        tables = [found[metric] for metric in metrics]
        parts = [part for v in ("better", "none", "worse") if (part := _quality_part(v, tables))]
        clauses.append(f"in {joined(list(map(name_of, metrics)))}, {', but '.join(parts)}")
    return f"Against {named(report, other)}: {'; '.join(clauses)}.", verdicts


def _quality_part(verdict: str, tables: list[list[tuple[str | None, Apart, str]]]) -> str:
    """What holds of all settings with a verdict, of which there are the same in each table."""
    chosen = [[row for row in table if row[1].verdict == verdict] for table in tables]
    if not chosen[0]:
        return ""
    what = "there is no difference" if verdict == "none" else f"it is {verdict}"
    settings = [row[0] for row in chosen[0] if row[0]]
    largest = [max(rows, key=lambda row: abs(row[1].value)) for rows in chosen]
    told = joined([_points(difference, unit) for _, difference, unit in largest])
    most = "" if len(chosen[0]) < 2 else "at most " if verdict == "none" else "up to "
    return f"{what}{f' with {joined(settings)}' if settings else ''} ({most}{told})"


def _points(difference: Apart, unit: str) -> str:
    """A difference; of percentages in points."""
    unit = "points" if unit == "%" else unit
    return quantity(difference.value, difference.error, unit, sign=True)


def _token_by_token(report: Report) -> list[str]:
    """What quality the diffusion mode has if a forward decides one token, and what its fastest
    setting has: published tables quote the quality of the one beside the speed of the other."""
    paces = report.of("speed", TIMES["speed"], subject="model")
    batch = min((f.at["batch"] for f in paces), default=None)
    for metric in dict.fromkeys((*written(report), FREE)):
        rows = {
            quality.setting: (quality, pace)
            for pace in paces
            for quality in marks(report, metric, subject="model", setting=pace.setting)
            if pace.at["batch"] == batch
            and report.settings[pace.setting].get("mode") == "diffusion"
        }
        slow = rows.pop(TOKEN_BY_TOKEN, None)
        if slow is None or not rows:
            continue
        fast = max(rows.values(), key=lambda row: row[1].value)
        difference = apart(slow[0], fast[0])
        if difference is None or difference.verdict != "better":
            return []
        told = [quantity(f.value, f.error, f.unit) for f in (*slow, *fast)]
        return [
            f"Token by token, its {name_of(metric)} is {told[0]} at {told[1]}; with "
            f"{fast[0].setting}, it is {told[2]} at {told[3]} (batch {batch}). The better quality "
            "does not come with the higher speed."
        ]
    return []


def _beside_control(report: Report, mine: Figure, base: Figure, change: Apart) -> list[str]:
    """How much of what the AR mode lost or gained is the conversion's doing: the control was tuned
    on the same data without one. Both are compared with the base, text by text."""
    for tuned in report.of("quality", "ar_nll", subject="control", setting=None)[:1]:
        other = apart(tuned, base)
        if other is None:
            continue
        value, error = change.value - other.value, math.hypot(change.error, other.error)
        told = quantity(abs(value), error, mine.unit)
        none = f"there is no difference ({told})"
        some = f"it is {'worse' if value > 0 else 'better'}, by {told}"
        return [
            f"Beside {named(report, 'control')}, which was tuned without being converted, "
            f"{none if abs(value) <= SURE * error else some}."
        ]
    return []


def _likelihood(report: Report) -> tuple[list[str], dict[str, Verdict]]:
    """The NLL of the AR mode beside the base's, and the bound, which is no likelihood."""
    said, verdicts = [], {}
    base = next(iter(report.of("quality", "ar_nll", subject="base", setting=None)), None)
    for mine in report.of("quality", "ar_nll", subject="model", setting=None)[:1]:
        if base and (difference := apart(mine, base)):
            verdicts["ar_nll"] = difference.verdict
            told = quantity(abs(difference.value), difference.error, mine.unit)
            than = named(report, "base")
            what = {
                "none": f"as well as {than}: there is no difference in NLL ({told})",
                "worse": f"worse than {than}, by {told}",
                "better": f"better than {than}, by {told}",
            }[difference.verdict]
            said.append(f"From left to right, {named(report)} predicts held-out text {what}.")
            said += _beside_control(report, mine, base, difference)
    for bound in report.of("quality", "bound", subject="model", setting=None)[:1]:
        told = quantity(bound.value, bound.error, bound.unit)
        beside = (
            f", beside an exact {quantity(base.value, base.error, base.unit)} of the base"
            if base
            else ""
        )
        said.append(
            f"When it denoises, its NLL is at most {told}{beside}; that is a bound, not a "
            "likelihood."
        )
    return said, verdicts
