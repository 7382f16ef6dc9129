"""Control: what a model that sees both sides of a gap can do and an autoregressive one cannot.

Gaps are filled (see `gaps`), and held to a constraint (see `constrained`). An answer is revised
after an edit of its question: the diffusion mode fills its numbers anew, the base writes it again.
And the order in which tokens are decided.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from . import constrained
from .estimates import mean, share, share_difference
from .figures import BASELINE, OWN, RANKED, STOCK, Order
from .gaps import (
    GAP,
    QUESTION,
    fill,
    fillers,
    gap_figures,
    gaps_of,
    middle_figures,
    ranked,
    true_middles,
)
from .journal import Part, Row
from .session import Found, Session, apart, cells_of
from .writing import Way, Written

ORDERS = 2  # answers whose order of commits is kept
WHERE = "the bound of a part of an answer is computed for text alone"
SUM = re.compile(r"(\d+) ([+-]) (\d+) = (\d+)\.")


def parts(session: Session) -> list[Part]:
    """What is measured: gaps, revisions and orders of commits, for each subject that can; and gaps
    under constraints."""
    found, cost = [], session.sizes.infills * GAP / 4
    for way in fillers(session):
        gaps = partial(gaps_of, session, way)
        found.append(Part(QUESTION, f"gaps, {way.name}", cost, gaps))
        if way.setting != RANKED:
            edits = partial(_edits, session, way)
            found.append(Part(QUESTION, f"edits, {way.name}", cost * 8, edits))
        if way.held.denoises:
            orders = partial(_orders, session, way)
            found.append(Part(QUESTION, f"order of commits, {way.name}", cost, orders))
    for held in () if session.sees else session.subjects.values():
        run = partial(true_middles, session, held)
        name = f"likelihood of the middle, {held.key}"
        found.append(Part(QUESTION, name, cost * 2, run))
    return [*found, *constrained.parts(session)]


def settings(session: Session) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """The settings that this question has of its own, and their callables."""
    own = [] if session.base is None else [ranked(session.base)]
    own += [way for way in constrained.ways(session) if not way.held.denoises]
    return (
        {way.setting: way.arguments for way in own},
        {way.setting: STOCK if way.stock else OWN for way in own},
    )


# Revision after an edit


def _edited(session: Session) -> list[tuple[str, str, str, str]]:
    """Questions in which the first number is one higher: prompt, answer so far, right answer."""
    found = []
    for question in session.material.questions:
        edited = edit(question.prompt, question.answer)
        if edited is not None:
            found.append((*edited, question.answer))
        if len(found) == session.sizes.edits:
            break
    return found


def edit(prompt: str, answer: str) -> tuple[str, str] | None:
    """A question and its right answer after its story's first number has grown by one; None if that
    is not simply done. The answer is a chain of sums, and then their result."""
    sums = SUM.findall(answer)
    first = re.search(r"\b(\d+)\b", prompt)
    if not sums or first is None or first[1] != sums[0][0] or int(first[1]) < 2:
        return None
    now = int(first[1]) + 1
    lines = []
    for _, sign, number, _ in sums:
        after = now + int(number) if sign == "+" else now - int(number)
        if not 0 <= after <= 20:
            return None
        lines.append(f"{now} {sign} {number} = {after}.")
        now = after
    story = f"{prompt[: first.start()]}{int(first[1]) + 1}{prompt[first.end() :]}"
    return story, " ".join([*lines, f"The answer is {now}."])


def _edits(session: Session, way: Way) -> list[Row]:
    """Answers to edited questions: with their words given, or written anew."""
    cases, found = _edited(session), []
    if len(cases) < 2:
        return [{"missing": "revision after an edit", "why": "the data has no sums to revise"}]
    for story, right, _ in cases:
        written, text = _revised(session, way, story, right)
        found.append(
            {
                "subject": way.held.key, "setting": way.setting, "edit": len(found),
                "right": text.strip() == right, "text": text, "forwards": written.forwards,
                "tokens": max(1, written.tokens), "steps": written.longest,
            }
        )  # fmt: skip
    return found


def _revised(session: Session, way: Way, story: str, right: str) -> tuple[Written, str]:
    """A revised answer. The diffusion mode is given all of it but its numbers: as many tokens as
    the right ones have, which are those of the old ones in nearly all cases."""
    (prompt,) = session.encode([story])
    if not way.held.denoises:
        written = way.write([prompt], session.clock, max_new_tokens=session.sizes.answer)
        return written, session.decode(written.answers[0])
    (whole,) = session.encode([f"{story} {right}"])
    mask, decode = way.held.checkpoint.spec.mask_token_id, session.decode
    gap = [n >= len(prompt) and any(map(str.isdigit, decode([t]))) for n, t in enumerate(whole)]
    asked = [mask if hole else token for hole, token in zip(gap, whole, strict=True)]
    written = fill(session, way, [asked])
    return written, decode(written.prompts[0][len(prompt) :])


def _edit_figures(session: Session, found: Found, rows: Sequence[Row]) -> None:
    cells = cells_of(rows, "edit")
    base = cells.get(("base", BASELINE))
    for way in fillers(session):
        cell = cells.get((way.held.key, way.setting))
        if cell is None:
            continue
        limit = 0 if way.held.denoises else session.sizes.answer
        evidence = way.evidence(cell, max_new_tokens=limit)
        right, apart_ = [row["right"] for row in cell], None
        if base is not None and way.held.key != "base":
            theirs = [row["right"] for row in base]
            apart_ = apart("base", BASELINE, share_difference(right, theirs))
        add = partial(
            found.add, QUESTION, subject=way.held.key, setting=way.setting, evidence=evidence
        )
        add("revision_exact_match", value=share(right), difference=apart_)
        add("revision_forwards", value=mean([row["forwards"] for row in cell]))


# Order of commits


def _orders(session: Session, way: Way) -> list[Row]:
    """When each token of a few answers was decided, and how probable it was."""
    rows = []
    prompts = session.prompts(ORDERS)
    texts = session.openings(ORDERS) if session.sees else list(map(session.decode, prompts))
    for prompt, text in zip(prompts, texts, strict=True):
        written = way.write([prompt], session.clock, max_new_tokens=session.sizes.answer)
        steps, logprobs = written.order[0]
        rows.append(
            {
                "subject": way.held.key, "setting": way.setting, "ordered": text,
                "pieces": [session.piece(token) for token in written.answers[0]],
                "forward": steps, "confidence": torch.tensor(logprobs).exp().tolist(),
            }
        )  # fmt: skip
    return rows


def figures(session: Session, rows: Sequence[Row]) -> Found:
    """The figures that the rows give."""
    found = Found()
    gap_figures(session, found, rows)
    middle_figures(session, found, rows)
    _edit_figures(session, found, rows)
    constrained.figures(session, found, rows)
    for row in rows:
        if "ordered" in row and row["subject"] == "model":
            found.orders.append(
                Order(
                    prompt=row["ordered"], tokens=row["pieces"], forward=row["forward"],
                    confidence=row["confidence"],
                )
            )  # fmt: skip
    if session.sees:
        session.miss(QUESTION, "likelihood of the middle of an answer", WHERE)
    if not session.model.denoises:
        why = "a draft adapter has no diffusion mode"
        session.miss(QUESTION, "filling and revising by the model", why)
    elif not session.model.fills:
        why = "its noise shows no masks, so it cannot fill gaps"
        if session.model.checkpoint.spec.noise.fills:
            why = "it reads its whole prompt in both directions, gaps and all"
        session.miss(QUESTION, "filling and revising by the model", why)
    return found
