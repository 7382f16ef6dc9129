"""Gaps that have to match: a held-out number or word is left out and filled under a constraint, a
regular expression or, written as a JSON object in its place, a schema.

The diffusion mode has the text on both sides. An AR model writes the gap from what precedes it,
held to the same automaton and to as many tokens; what follows is then appended. Its drawn texts
that the base ranks by what follows are its best way to read the other side.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch

from ..core.conflicts import CONSTRAINTS
from ..core.index import check_installed
from ..core.pattern import validates
from ..generation.complete import begin, settings_of
from ..generation.tokens import text_after
from .constrained_gaps import Case, Form, cases_of
from .estimates import Value, mean, ratio, ratio_difference, share, share_difference
from .figures import AR, Difference, Figure, Text
from .gaps import CANDIDATES, QUESTION
from .journal import Part, Row
from .quality import continued_nats
from .session import Found, Session, apart, cells_of
from .subjects import USUAL, Held
from .writing import Counter, Way, wait

SHOWN = 5  # gaps under each constraint whose fillings are shown
RANKED_AR = "ranked ar"
DRAWN = {"do_sample": True, "temperature": 1.0, "mode": "ar", "num_return_sequences": CANDIDATES}
HOW = (
    "a {kind} at a random place of each held-out text, and as many tokens as it has there; "
    "autoregressive models write it from what precedes it"
)


def parts(session: Session) -> list[Part]:
    """What is measured: gaps under each constraint, filled by all in turn."""
    if not any(way.held.fills for way in session.ways(USUAL)):
        return []
    return [
        Part(QUESTION, f"gaps held to a {name}", session.sizes.infills * 24, run)
        for name in ("regex", "JSON schema")
        for run in (partial(_measured, session, name),)
    ]


def ways(session: Session) -> list[Way]:
    """Who fills such gaps: diffusion modes, AR models from left to right, and draws of the base."""
    drawn = [] if session.base is None else [Way(session.base, RANKED_AR, DRAWN)]
    fill = [way for way in session.ways(USUAL) if way.held.fills]
    return [*fill, *session.left_to_right(), *drawn]


def protocol(figures: Iterable[Figure]) -> dict[str, Any]:
    """What figures were held to, and how."""
    found: dict[str, Any] = {}
    for figure in figures:
        if "constraint" in figure.at:
            held = {k: v for k, v in figure.evidence["arguments"].items() if k in CONSTRAINTS}
            found[figure.at["constraint"]] = json.dumps(held)
            found["gaps"] = HOW.format(kind=figure.evidence["kind"])
    return {"constraint": found} if found else {}


def _measured(session: Session, name: str) -> list[Row]:
    """All gaps under a constraint, each filled by all ways in turn, one at a time."""
    check_installed("outlines_core", *(["jsonschema"] if name != "regex" else []))
    form, cases = cases_of(session, name)
    every, rows = ways(session), []
    torch.manual_seed(session.seed)
    for way in every:
        _filled(session, way, form, cases[0])  # makes the automaton, which all gaps share
    for number, case in enumerate(cases):
        turn = number % len(every)
        rows += [_row(session, way, form, case, number) for way in every[turn:] + every[:turn]]
    return rows


def _row(session: Session, way: Way, form: Form, case: Case, number: int) -> Row:
    held, room = way.held, len(case.gap)
    gap, seconds, forwards, options = _filled(session, way, form, case)
    words = [token for token in case.left if token >= 0]
    text = text_after(held.checkpoint.tokenizer, words, gap)
    text = text.removeprefix(" ") if case.segments[0].endswith(" ") else text
    if options.regex is None:
        matches = validates(options, text)
    else:  # by another engine than the one that held it
        matches = re.fullmatch(options.regex, text) is not None
    nats = 0.0
    if session.base is not None:
        (nats,) = continued_nats(session.base, [case.left], [[*gap, *case.right]])
    return {
        "subject": held.key, "setting": way.setting, "constraint": form.name, "kind": form.kind,
        "case": number, "prompt": case.shown, "true": case.true,
        "matches": matches, "text": text,
        "right": matches and form.read(text) == form.read(case.true),
        "nats": nats, "scored": room + len(case.right), "after": len(case.right),
        "read_after": _read_after(held, case), "seconds": seconds,
        "forwards": forwards, "tokens": room, "steps": room,
    }  # fmt: skip


def _filled(
    session: Session, way: Way, form: Form, case: Case
) -> tuple[list[int], float, int, Any]:
    """The gap as a way fills it, seconds and forwards that it took, and the options."""
    checkpoint, room = way.held.checkpoint, len(case.gap)
    limits = {"max_new_tokens": 0}
    row = case.left
    if way.held.denoises:
        row = [*case.left, *[checkpoint.spec.mask_token_id] * room, *case.right]
    else:
        limits = {"max_new_tokens": room, "min_new_tokens": room}
    given = way.arguments | form.arguments | limits
    spec, options = settings_of(checkpoint, given, gaps=way.held.denoises)
    count, counter = options.num_return_sequences, Counter()
    with counter.watching(checkpoint.model):
        wait(checkpoint.model.device)
        start = session.clock()
        canvas, states = begin(checkpoint, spec, options, [row] * count, [case.segments] * count)
        for _ in states:
            pass
        gaps = canvas.ids[:, len(case.left) : len(case.left) + room].tolist()
        gap = gaps[0] if count == 1 else _likeliest(way.held, case, gaps)
        wait(checkpoint.model.device)
        seconds = session.clock() - start
    return gap, seconds, counter.forwards, options


def _likeliest(base: Held, case: Case, gaps: Sequence[list[int]]) -> list[int]:
    """The gap with which the whole text is likeliest."""
    rows = [[*gap, *case.right] for gap in gaps]
    nats = continued_nats(base, [case.left] * len(gaps), rows)
    return gaps[min(range(len(gaps)), key=nats.__getitem__)]


def _read_after(held: Held, case: Case) -> int:
    """How many tokens after a gap are read when its last token is decided."""
    if not held.denoises:
        return 0
    block = held.checkpoint.spec.block_length
    known = -(len(case.left) + len(case.gap)) % block if block else len(case.right)
    return min(known, len(case.right))


def figures(session: Session, found: Found, rows: Sequence[Row]) -> None:
    """Add what the rows about constraints say, and some of the texts."""
    for name in dict.fromkeys(row["constraint"] for row in rows if "constraint" in row):
        cells = cells_of([row for row in rows if row.get("constraint") == name], "constraint")
        cells = {who: sorted(cell, key=lambda row: row["case"]) for who, cell in cells.items()}
        for way in ways(session):
            cell = cells.get((way.held.key, way.setting))
            if cell is not None:
                base = cells.get(("base", AR))
                _add(session, found, way, cell, None if cell is base else base)
        found.texts += [
            Text(
                question=QUESTION, prompt=row["prompt"], subject=subject, setting=setting,
                text=row["text"],
            )
            for (subject, setting), cell in cells.items()
            for row in cell[:SHOWN]
        ]  # fmt: skip


def _add(
    session: Session, found: Found, way: Way, cell: Sequence[Row], base: Sequence[Row] | None
) -> None:
    """Add the figures of a way under a constraint, beside those of the base from left to right.

    Args:
        base: its rows, of the same gaps; None if this is it, or it was not measured.
    """
    form = Form.named(cell[0]["constraint"], cell[0]["kind"])
    evidence = way.evidence(cell, **form.arguments) | {"kind": form.kind}
    if way.held.denoises:
        for name in ("after", "read_after"):
            evidence[f"tokens_{name}"] = mean([row[name] for row in cell]).value
    add = partial(
        found.add, QUESTION, subject=way.held.key, setting=way.setting, evidence=evidence,
        at={"constraint": form.label},
    )  # fmt: skip

    def beside(difference: Callable[[Sequence[Row], Sequence[Row]], Value]) -> Difference | None:
        return None if base is None else apart("base", AR, difference(cell, base))

    for field, metric in (("matches", "constrained_matches"), ("right", "constrained_exact_match")):
        hits = beside(lambda *pair, f=field: share_difference(*([r[f] for r in c] for c in pair)))
        add(metric, value=share([row[field] for row in cell]), difference=hits)
    if session.base is not None:
        add(
            "constrained_base_nll", value=ratio(*_nats(cell)),
            difference=beside(lambda *pair: ratio_difference(*map(_nats, pair))),
            evidence=evidence | {"estimator": "exact"},
        )  # fmt: skip
    for field, metric in (
        ("forwards", "constrained_forwards"), ("seconds", "constrained_seconds"),
    ):  # fmt: skip
        spent = beside(
            lambda *pair, f=field: mean([a[f] - b[f] for a, b in zip(*pair, strict=True)])
        )
        add(metric, value=mean([row[field] for row in cell]), difference=spent)


def _nats(cell: Sequence[Row]) -> tuple[list[float], list[float]]:
    return [row["nats"] for row in cell], [row["scored"] for row in cell]
