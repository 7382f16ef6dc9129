"""What the figures say, in sentences: for each question one to decide by, and those that qualify
it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from itertools import groupby

from .claim import Claim, named
from .control_sentences import control_claim
from .figures import QUESTIONS, Figure, Missing, Report
from .pairs import (
    SURE,
    TIMES,
    Apart,
    Pair,
    Verdict,
    apart,
    best_pair,
    quality_apart,
    written,
)
from .quality_sentences import quality_claim
from .words import SPACE, capital, in_turn, joined, name_of, quantity, with_error


def claims(report: Report) -> dict[str, Claim]:
    """What a report says, by question."""
    makers: dict[str, Callable[[Report], Claim]] = {
        "speed": _speed, "quality": quality_claim, "length": _length, "control": control_claim,
    }  # fmt: skip
    made = {}
    for question in QUESTIONS:
        measured = any(f.question == question and f.subject == "model" for f in report.figures)
        made[question] = (
            makers[question](report)
            if measured
            else Claim(question, f"{capital(question)} was not measured.")
        )
    return made


def not_measured(report: Report) -> list[Missing]:
    """What was not measured: what the report lists, and whole questions without a figure."""
    found = list(report.missing)
    known = {missing.question for missing in found}
    known |= {figure.question for figure in report.figures if figure.subject == "model"}
    found += [Missing(question=q, what="everything", why="it was not asked for")
              for q in QUESTIONS if q not in known]  # fmt: skip
    if "base" not in report.subjects:
        found.append(
            Missing(question="quality", what="the base", why="the report was made without one")
        )
    return found


def _condition(report: Report, kind: str) -> str:
    metric = name_of(next(iter(written(report)), ""))
    return {
        "equal": f"at equal {metric}",
        "unequal": f"with no equal {metric} at any setting",
        "unknown": "with its quality at these settings unmeasured",
    }[kind]


# Speed --------------------------------------------------------------------------------------------


def _speed(report: Report) -> Claim:
    own = report.of("speed", TIMES["speed"], subject="model")
    batches = sorted({f.at["batch"] for f in own if "batch" in f.at})
    found = _by_batch(report, "base", batches)
    if not found:
        best = max(own, key=lambda f: f.value, default=None)
        if best is None:
            return Claim("speed", "How many tokens it writes in a second was not measured.")
        rate = quantity(best.value, best.error, best.unit)
        place = f" at batch {best.at['batch']}" if "batch" in best.at else ""
        return Claim(
            "speed",
            f"{named(report)} writes {rate}{place} with {best.setting}; there is no base to "
            "compare it with.",
        )
    more = [_settings_at(found, "batch"), *_bought(report, batches[0])]
    more += _beside_own_ar(report, batches)
    for other in list(report.subjects)[1:]:
        if other != "base":
            theirs = _by_batch(report, other, batches)
            more += [_pace_sentence(report, theirs, other)] if theirs else []
    verdicts = {f"batch {b}": pair.apart.verdict for b, (_, pair) in found.items()}
    return Claim("speed", _pace_sentence(report, found, "base"), more, verdicts)


def _by_batch(report: Report, to: str, batches: list[float]) -> dict[float, tuple[str, Pair]]:
    """`best_pair` at each batch at which there is one."""
    found = {batch: best_pair(report, "speed", to, {"batch": batch}) for batch in batches}
    return {batch: pair for batch, pair in found.items() if pair is not None}


def _pace_sentence(report: Report, found: dict[float, tuple[str, Pair]], to: str) -> str:
    clauses = []
    for kind, group in groupby(found.items(), key=lambda item: item[1][0]):
        places = [(f"{batch}", pair.apart) for batch, (_, pair) in group]
        than, axis = ("", "") if clauses else (named(report, to), "batch ")
        runs = []
        for verdict, run in groupby(places, key=lambda place: place[1].verdict):
            runs.append(_pace_run(verdict, list(run), than, axis))
            than = axis = ""
        who = "it" if clauses else named(report)
        clauses.append(f"{_condition(report, kind)}, {who} is {in_turn(runs)}")
    return f"{capital('; '.join(clauses))}."


def _pace_run(verdict: Verdict, places: list[tuple[str, Apart]], than: str, axis: str) -> str:
    """`1.9x as fast as BASE at batch 1 and 1.4x at 4`: neighbours with the same verdict.

    Args:
        than: what it is compared with, if that is to be said. axis: of the first place, likewise.
    """
    times = [_times(difference.value) for _, difference in places]
    named = [f"{axis if n == 0 else ''}{place}" for n, (place, _) in enumerate(places)]
    if verdict == "better":
        first = f"{times[0]} as fast{f' as {than}' if than else ''} at {named[0]}"
        return joined([first, *(f"{t} at {p}" for t, p in zip(times[1:], named[1:], strict=True))])
    than = f" than {than}" if than else ""
    if verdict == "none":
        return f"no faster{than} at {joined(named)}"
    return f"slower{than} at " + joined([f"{p} ({t})" for t, p in zip(times, named, strict=True)])


def _times(ratio: float) -> str:
    """A ratio as `1.9x`, with more digits where it is near 1 or below."""
    return f"{ratio:.{1 if ratio >= 1.1 else 2}f}x"


def _settings_at(found: dict[float, tuple[str, Pair]], axis: str) -> str:
    parts = [
        f"{with_error(pair.apart.value, pair.apart.error)} at {axis} {place} "
        f"({pair.mine.setting} against {pair.other.setting})"
        for place, (_, pair) in found.items()
    ]
    return f"The ratios of speed are {joined(parts)}."


def _beside_own_ar(report: Report, batches: list[float]) -> list[str]:
    """What drafting is worth to a model whose AR mode would write the same text."""
    told = []
    for batch in batches:
        pair = [
            figure
            for setting in ("lossless", "ar")
            for figure in report.of(
                "speed", TIMES["speed"], subject="model", setting=setting, batch=batch
            )
        ]
        if len(pair) == 2 and (gain := apart(*pair, ratio=True)):
            told.append(f"{with_error(gain.value, gain.error)} at batch {batch}")
    if not told:
        return []
    return [f"Its lossless mode has so many times the speed of its own AR mode: {joined(told)}."]


def _bought(report: Report, batch: float) -> list[str]:
    """What the fastest setting costs, if it is not of equal quality."""
    fastest = max(
        report.of("speed", TIMES["speed"], subject="model", batch=batch), key=lambda f: f.value
    )
    for other in report.of("speed", TIMES["speed"], subject="base", batch=batch):
        gain, cost = apart(fastest, other, ratio=True), quality_apart(report, fastest, other)
        if gain and cost and gain.verdict == "better" and cost.verdict == "worse":
            metric = written(report)[0]
            unit = report.of("quality", metric)[0].unit
            points = "points" if unit == "%" else unit
            return [
                f"{capital(fastest.setting or '')} is {_times(gain.value)} as fast as "
                f"{other.setting} at batch {batch}, and costs "
                f"{quantity(abs(cost.value), cost.error, points)} of {name_of(metric)}."
            ]
    return []


# Length -------------------------------------------------------------------------------------------


def _length(report: Report) -> Claim:
    places = sorted(
        {
            (f.at["prompt"], f.at["answer"])
            for f in report.of("length", TIMES["length"], subject="model")
            if {"prompt", "answer"} <= f.at.keys()
        },
        key=lambda place: (sum(place), place),
    )
    found = {
        (p, a): pair
        for p, a in places
        if (pair := best_pair(report, "length", "base", {"prompt": p, "answer": a}))
    }
    more = _past_training(report)
    if not found:
        first = (
            "At which lengths it pays off is not known: there is nothing to compare its times with."
        )
        return Claim("length", first, more)
    verdicts = {f"{p}+{a}": pair.apart.verdict for (p, a), (_, pair) in found.items()}
    kinds = {kind for kind, _ in found.values()}
    kind = next(k for k in ("unknown", "unequal", "equal") if k in kinds)
    faster = [pair for _, pair in found.values() if pair.apart.verdict == "better"]
    if faster:
        best = max(faster, key=lambda pair: pair.apart.value)
        where = f"{best.mine.at['prompt']} + {_tokens(best.mine.at['answer'])} of prompt and answer"
        gain = with_error(best.apart.value, best.apart.error)
        pair = f"{best.mine.setting} against {best.other.setting}"
        more.insert(0, f"It gains most at {where}, with {gain} times the speed ({pair}).")
    pays = _where_it_pays(report, found)
    return Claim("length", capital(f"{_condition(report, kind)}, {pays}."), more, verdicts)


def _where_it_pays(
    report: Report, found: dict[tuple[float, float], tuple[str, Pair]]
) -> str:  # fmt: skip
    it, than = named(report), f"than {named(report, 'base')}"
    pays = [place for place in found if found[place][1].apart.verdict == "better"]
    fails = [place for place in found if place not in pays]
    rest = {found[place][1].apart.verdict for place in fails}
    words = [word for verdict, word in (("none", "no faster"), ("worse", "slower"))
             if verdict in rest]  # fmt: skip
    beyond = f"{', or even '.join(words)} {than}"
    if not fails:
        longest = _tokens(max(map(sum, pays)))
        return f"{it} is faster {than} at every length that was measured, up to {longest} in all"
    if not pays:
        low, high = min(map(sum, fails)), max(map(sum, fails))
        return (
            f"{it} pays off at no length that was measured: from {low:,} to {_tokens(high)} of "
            f"prompt and answer together it is {beyond}"
        )
    axes: Iterable[tuple[str, Callable[[tuple[float, float]], float]]] = (
        ("of prompt and answer together", sum),
        ("of answer", lambda place: place[1]),
        ("of prompt", lambda place: place[0]),
    )
    for what, size in axes:
        good, bad = sorted(map(size, pays)), sorted(map(size, fails))
        if good[-1] < bad[0]:
            return (
                f"{it} pays off up to {_tokens(good[-1])} {what}; from {bad[0]:,} on it is {beyond}"
            )
        if bad[-1] < good[0]:
            return (
                f"{it} pays off from {_tokens(good[0])} {what} on; up to {bad[-1]:,} it is {beyond}"
            )
    listed = joined([f"{p:,} + {a:,}" for p, a in fails])
    return (
        f"{it} pays off except at {listed}{SPACE}tokens of prompt and answer, where it is {beyond}"
    )  # fmt: skip


def _tokens(count: float) -> str:
    return f"{count:,}{SPACE}tokens"


def _past_training(report: Report) -> list[str]:
    """What becomes of the likelihood where no training row reached."""
    trained, said = report.subjects["model"].trained_length, []
    for metric in ("bound", "ar_nll") if trained else ():
        rows = [f for f in report.of("length", metric, subject="model") if "position" in f.at]
        within = [f for f in rows if f.at["position"] <= trained]
        past = [f for f in rows if f.at["position"] > trained]
        if not within or not past:
            continue
        last = max(within, key=lambda f: f.at["position"])
        change = _mean(past)[0] - last.value
        error = math.hypot(_mean(past)[1], last.error or 0)
        told = quantity(abs(change), error, last.unit)
        less = abs(change) <= SURE * error
        moved = "does not change" if less else f"{'rises' if change > 0 else 'falls'} by {told}"
        said.append(
            f"Past the {_tokens(trained)} of its training rows its {name_of(metric)} {moved}."
        )
    return said


def _mean(figures: list[Figure]) -> tuple[float, float]:
    count = len(figures)
    error = math.sqrt(sum((f.error or 0) ** 2 for f in figures)) / count
    return sum(f.value for f in figures) / count, error
