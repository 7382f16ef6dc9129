"""What a report says of control."""

from __future__ import annotations

from collections.abc import Sequence

from .claim import Claim, named
from .figures import AR, Figure, Report
from .pairs import Verdict, apart
from .words import in_turn, joined, quantity

FILLING = "infill_exact_match"
THAN = {"better": "more than", "worse": "fewer than", "none": "no difference from"}


def control_claim(report: Report) -> Claim:
    """What the figures of control say."""
    mine = max(report.of("control", FILLING, subject="model"), key=_value, default=None)
    theirs = report.of("control", FILLING, subject="base")
    more = [*_kept(report), *_constrained(report)]
    if mine is None:
        return Claim("control", "How well it fills gaps was not measured.", more)
    fills = f"{named(report)} fills {_shown(mine)} of the gaps exactly"
    if not theirs:
        return Claim("control", f"{fills}; there is no base to compare it with.", more)
    clauses, verdicts = _against(report, mine, theirs)
    first = f"Given both sides, {fills}: {clauses}."
    return Claim("control", first, more, {FILLING: verdicts[0]})


def _against(report: Report, mine: Figure, theirs: Sequence[Figure]) -> tuple[str, list[Verdict]]:
    """How a figure compares with those of others, the best of them first."""
    ways = sorted(theirs, key=_value, reverse=True)
    verdicts = [apart(mine, other).verdict for other in ways]
    runs: list[list[str]] = []
    subject, said = None, None
    for other, verdict in zip(ways, verdicts, strict=True):
        who = "it" if other.subject == subject else named(report, other.subject)
        words = [who] if who != "it" or verdict != said else []
        words += [f"with {other.setting}"] if other.setting else []
        told = " ".join([*words, f"({_shown(other)})"])
        if verdict == said:
            runs[-1].append(told)
        else:
            runs.append([f"{THAN[verdict]} {told}"])
        subject, said = other.subject, verdict
    return in_turn([joined(run) for run in runs]), verdicts


def _kept(report: Report) -> list[str]:
    said = []
    for figure in report.of("control", "forced_kept", subject="model")[:1]:
        said.append(f"It keeps {_shown(figure)} of forced tokens.")
    for figure in report.of("control", "revision_exact_match", subject="model")[:1]:
        cost = next(iter(report.of("control", "revision_forwards", subject="model")), None)
        took = f", in {_shown(cost)}" if cost else ""
        said.append(f"After an edit it restores {_shown(figure)} of the texts exactly{took}.")
    return said


# Constraints


def _constrained(report: Report) -> list[str]:
    """How often gaps that must match get the right content, and what that takes."""
    said = []
    own = report.of("control", "constrained_exact_match", subject="model")
    for name in dict.fromkeys(figure.at["constraint"] for figure in own):
        mine = max((f for f in own if f.at["constraint"] == name), key=_value)
        every = report.of("control", mine.metric, constraint=name)
        theirs = [f for f in every if f.subject in ("base", "control")]
        told = f"Held to a {name}, it finds the right content of {_shown(mine)} of the gaps"
        if theirs:
            told += f": {_against(report, mine, theirs)[0]}"
        said.append(f"{told}.{_cost(report, mine)}")
    misses = [f for f in report.of("control", "constrained_matches") if f.value < 100]
    for f in misses:
        said.append(
            f"Of the gaps that {named(report, f.subject)} filled with {f.setting}, held to a "
            f"{f.at['constraint']}, only {_shown(f)} match."
        )
    if own and not misses:
        said.append("All of these gaps match, whoever filled them.")
    return said


def _cost(report: Report, mine: Figure) -> str:
    """What a gap takes, beside the base from left to right."""
    told = []
    for who, setting in (("model", mine.setting), ("base", AR)):
        spent = [
            _shown(figure)
            for metric in ("constrained_forwards", "constrained_seconds")
            for figure in report.of("control", metric, subject=who, setting=setting, **mine.at)
        ]
        if spent:
            name = named(report, who) if told else "It"
            told.append(f"{name} takes {joined(spent)} for a gap with {setting}")
    return f" {'; '.join(told)}." if told else ""


def _shown(figure: Figure) -> str:
    return quantity(figure.value, figure.error, figure.unit)


def _value(figure: Figure) -> float:
    return figure.value
