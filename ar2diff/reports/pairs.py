"""How far figures are apart, and which figures are to be held against each other. A difference
within two standard errors is none.

Each side is taken at its best: at every batch and length, the fastest settings of equal quality. So
the base, too, has the faster of its ways.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

from .figures import LOOKUP, Figure, Report

SURE = 2.0  # standard errors that a difference must exceed
FREE = "base_nll"  # of free text
TIMES = {"speed": "tokens_per_second", "length": "seconds_per_token"}

Verdict = Literal["better", "worse", "none"]


@dataclass(frozen=True)
class Apart:
    """How far two figures are apart.

    Attributes:
        value, error: a difference; or, with `ratio`, how many times as good the first one is.
    """

    value: float
    error: float
    ratio: bool
    verdict: Verdict


@dataclass(frozen=True)
class Pair:
    """A setting of the model beside one of another subject, at one place of the axes."""

    mine: Figure
    other: Figure
    apart: Apart


def apart(mine: Figure, other: Figure, ratio: bool = False) -> Apart | None:
    """How far the first figure is from the second: by the paired difference that was recorded with
    either, else as if they were independent.

    Args:
        ratio: how many times as good it is, instead of the difference.

    Returns:
        None if a ratio is wanted of values that are not positive.
    """
    value, error = _recorded(mine, other, ratio) or _independent(mine, other, ratio)
    if ratio:
        if value <= 0:
            return None
        if mine.better == "low":
            value, error = 1 / value, error / value**2
        # The same for both directions: that of the logarithm.
        distance, spread, up = math.log(value), error / value, True
    else:
        distance, spread, up = value, error, mine.better != "low"
    verdict: Verdict = "none"
    if abs(distance) > SURE * spread:
        verdict = "better" if (distance > 0) == up else "worse"
    return Apart(value, error, ratio, verdict)


def _recorded(mine: Figure, other: Figure, ratio: bool) -> tuple[float, float] | None:
    for one, two, turned in ((mine, other, False), (other, mine, True)):
        found = one.difference
        same = found and (found.to, found.setting) == (two.subject, two.setting)
        if not same or found.ratio != ratio:
            continue
        if not turned:
            return found.value, found.error
        if not ratio:
            return -found.value, found.error
        if found.value > 0:
            return 1 / found.value, found.error / found.value**2
    return None


def _independent(mine: Figure, other: Figure, ratio: bool) -> tuple[float, float]:
    a, b = mine.error or 0.0, other.error or 0.0
    if not ratio:
        return mine.value - other.value, math.hypot(a, b)
    if mine.value <= 0 or other.value <= 0:
        return 0.0, 0.0
    value = mine.value / other.value
    return value, value * math.hypot(a / mine.value, b / other.value)


def written(report: Report) -> list[str]:
    """The metrics that judge what a model writes, the one to compare speeds at first. Where no
    answer can be right, that is the NLL of its greedy text under the base."""
    found = dict.fromkeys(
        f.metric
        for f in report.figures
        if f.question == "quality" and f.better and f.setting and _is_judged(f.metric)
    )
    if not found and marks(report, FREE):
        return [FREE]
    return sorted(found, key=lambda metric: metric != "exact_match")


def marks(report: Report, metric: str, **where: Any) -> list[Figure]:
    """The figures of a metric that judges what is written, greedily; arguments as of
    `Report.of`."""
    found = report.of("quality", metric, **where)
    return [figure for figure in found if not figure.at.get("temperature")]


def _is_judged(metric: str) -> bool:
    return metric == "exact_match" or metric.startswith("task:")


def quality_at(report: Report, metric: str, subject: str, setting: str | None) -> Figure | None:
    """The quality of what a subject writes at a setting. What decodes the same text faster has the
    quality of the text: verified drafts that of the AR mode, prompt lookup that of the base."""
    found = marks(report, metric, subject=subject, setting=setting)
    if found:
        return found[0]
    if setting == LOOKUP:
        return next(iter(marks(report, metric, subject=subject)), None)
    options = report.settings.get(setting or "", {})
    if options.get("mode") == "speculative":
        for figure in marks(report, metric, subject=subject):
            if report.settings.get(figure.setting or "", {}).get("mode") == "ar":
                return figure
    return None


def quality_apart(report: Report, mine: Figure, other: Figure) -> Apart | None:
    """How far the quality is apart at the settings of two figures; None if it is not known."""
    for metric in written(report)[:1]:
        one = quality_at(report, metric, mine.subject, mine.setting)
        two = quality_at(report, metric, other.subject, other.setting)
        if one and two:
            return apart(one, two)
    return None


def best_pair(
    report: Report, question: str, to: str, at: dict[str, float | int | str]
) -> tuple[str, Pair] | None:
    """The fastest settings of the model and of another subject at a place of the axes: of those
    with equal quality, else of those with another, else of all.

    Returns:
        (`equal`, `unequal` or `unknown` quality, the pair); None if one of them was not measured.
    """
    metric = TIMES[question]
    found: dict[str, list[Pair]] = {"equal": [], "unequal": [], "unknown": []}
    sides = [report.of(question, metric, subject=who, **at) for who in ("model", to)]
    for mine, other in product(*sides):
        difference = apart(mine, other, ratio=True)
        if difference is None:
            continue
        quality = quality_apart(report, mine, other)
        kind = "unknown" if quality is None else "unequal"
        kind = "equal" if quality is not None and quality.verdict == "none" else kind
        found[kind].append(Pair(mine, other, difference))
    for kind, pairs in found.items():
        if pairs:
            return kind, max(pairs, key=_pace)
    return None


def _pace(pair: Pair) -> float:
    """The speeds of a pair, multiplied: the same whoever is called the model."""
    product_of = pair.mine.value * pair.other.value
    return product_of if pair.mine.better != "low" else 1 / product_of
