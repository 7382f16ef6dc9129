"""Control: what a model that sees both sides of a gap can do and an autoregressive one cannot.

The middle of a held-out text is left out. The diffusion mode fills it; the base writes on from the
left, once greedily, once by ranking several drawn middles by how likely they make what follows. An
answer is revised after an edit of its question: the diffusion mode fills its numbers anew, the base
writes it again. What is given must be kept.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from ..diffusion.likelihood import ar_nll, scored
from .estimates import mean, ratio, ratio_difference, share, share_difference
from .figures import BASELINE, RANKED, STOCK, Order
from .journal import Part, Row
from .length import long_rows, stretch_bound
from .quality import continued_nats
from .session import Found, Session, apart, cells_of
from .subjects import STOCK_ARGUMENTS, USUAL, Held
from .writing import Way, Written, batches

QUESTION = "control"
LEFT, GAP, RIGHT = 32, 6, 10  # tokens before, in and after a gap
CANDIDATES = 8  # middles among which the base chooses
BATCH = 16
ORDERS = 2  # answers whose order of commits is kept
SUM = re.compile(r"(\d+) ([+-]) (\d+) = (\d+)\.")


def parts(session: Session) -> list[Part]:
    """What is measured: gaps, revisions and orders of commits, for each subject that can."""
    found, cost = [], session.sizes.infills * GAP / 4
    for way in _fillers(session):
        gaps = partial(_gaps, session, way)
        found.append(Part(QUESTION, f"gaps, {way.name}", cost, gaps))
        if way.setting != RANKED:
            edits = partial(_edits, session, way)
            found.append(Part(QUESTION, f"edits, {way.name}", cost * 8, edits))
        if way.held.denoises:
            orders = partial(_orders, session, way)
            found.append(Part(QUESTION, f"order of commits, {way.name}", cost, orders))
    for held in session.subjects.values():
        run = partial(_middles, session, held)
        name = f"likelihood of the middle, {held.key}"
        found.append(Part(QUESTION, name, cost * 2, run))
    return found


def settings(session: Session) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """The settings that this question has of its own, and their callables."""
    if session.base is None:
        return {}, {}
    return {RANKED: _ranked(session.base).arguments}, {RANKED: STOCK}


def _ranked(base: Held) -> Way:
    drawn = {"do_sample": True, "temperature": 1.0, "top_k": 0}
    drawn["num_return_sequences"] = CANDIDATES
    return Way(base, RANKED, STOCK_ARGUMENTS | drawn)


def _fillers(session: Session) -> list[Way]:
    """Ways that fill gaps or, in the base, stand in for it."""
    ways = [way for way in session.ways(USUAL, BASELINE) if way.held.key != "control"]
    return ways if session.base is None else [*ways, _ranked(session.base)]


# Gaps


def _rows(session: Session) -> list[list[int]]:
    """Texts with a gap from `LEFT` to `LEFT + GAP`."""
    length = LEFT + GAP + RIGHT
    rows = long_rows(session, length, session.sizes.infills)
    if len(rows) < 2:
        raise ValueError(f"fewer than 2 texts have {length} tokens")
    return rows


def _gaps(session: Session, way: Way) -> list[Row]:
    """The middles that a way writes, and what the base says of them and of what follows."""
    torch.manual_seed(session.seed)
    found: list[Row] = []
    for group in batches(_rows(session), BATCH):
        written, middles, kept = _filled(session, way, group)
        left = [row[:LEFT] for row in group]
        new = [[*middle, *row[LEFT + GAP :]] for middle, row in zip(middles, group, strict=True)]
        nats = [0.0] * len(group)
        if session.base is not None:
            nats = continued_nats(session.base, left, new)
        for row, middle, value, keeps in zip(group, middles, nats, kept, strict=True):
            found.append(
                {
                    "subject": way.held.key, "setting": way.setting, "gap": len(found),
                    "exact": middle == row[LEFT : LEFT + GAP], "text": session.decode(middle),
                    "nats": value, "kept": keeps, "tokens": GAP + RIGHT, "forwards": 0, "steps": 0,
                }
            )  # fmt: skip
        found[-1] |= {"forwards": written.forwards, "steps": written.longest}
    return found


def _filled(
    session: Session, way: Way, group: Sequence[list[int]]
) -> tuple[Written, list[list[int]], list[int]]:
    """The middles, and how many of the tokens after the gap are kept. A way that cannot fill gaps
    writes on, and keeps those that it would have written itself."""
    if way.held.denoises:
        mask = way.held.checkpoint.spec.mask_token_id
        asked = [[*row[:LEFT], *[mask] * GAP, *row[LEFT + GAP :]] for row in group]
        written = _fill(session, way, asked)
        kept = [
            sum(a == b for a, b in zip(new[LEFT + GAP :], row[LEFT + GAP :], strict=True))
            for new, row in zip(written.prompts, group, strict=True)
        ]
        return written, [new[LEFT : LEFT + GAP] for new in written.prompts], kept
    left = [row[:LEFT] for row in group]
    if way.setting == RANKED:
        written = way.write(left, session.clock, max_new_tokens=GAP, min_new_tokens=GAP)
        return written, _best(session.base, group, written.answers), [RIGHT] * len(group)
    new = GAP + RIGHT
    written = way.write(left, session.clock, max_new_tokens=new, min_new_tokens=new)
    kept = [
        sum(a == b for a, b in zip(answer[GAP:], row[LEFT + GAP :], strict=True))
        for answer, row in zip(written.answers, group, strict=True)
    ]
    return written, [answer[:GAP] for answer in written.answers], kept


def _fill(session: Session, way: Way, prompts: Sequence[list[int]]) -> Written:
    """Prompts with their gaps filled, without the warning that a block model does not read all that
    follows a gap: the report says so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*tokens after the gap")
        return way.write(prompts, session.clock, max_new_tokens=0)


def _read_after(held: Held) -> int:
    """How many of the tokens after a gap the model reads when it fills it."""
    block = held.checkpoint.spec.block_length or LEFT + GAP + RIGHT
    return min(RIGHT, -(LEFT + GAP) % block)


def _best(
    base: Held, group: Sequence[list[int]], candidates: Sequence[list[int]]
) -> list[list[int]]:
    """Of each row's candidates the one with which the whole text is likeliest."""
    rows = [row for row in group for _ in range(CANDIDATES)]
    left = [row[:LEFT] for row in rows]
    whole = [[*c, *row[LEFT + GAP :]] for c, row in zip(candidates, rows, strict=True)]
    nats = continued_nats(base, left, whole)
    best = []
    for start in range(0, len(rows), CANDIDATES):
        chosen = min(range(start, start + CANDIDATES), key=nats.__getitem__)
        best.append(candidates[chosen])
    return best


def _middles(session: Session, held: Held) -> list[Row]:
    """Nats of the true middles, given both sides or what precedes them."""
    rows, checkpoint = _rows(session), held.checkpoint
    suppressed = checkpoint.suppressed
    tokens = [int(scored(row, suppressed)[LEFT : LEFT + GAP].sum()) for row in rows]
    found: list[Row] = [
        {"subject": held.key, "middle": n, "scored": t} for n, t in enumerate(tokens)
    ]
    if held.has_ar_mode:
        window = checkpoint.spec_or_causal.local_window
        ends = [
            ar_nll(checkpoint.model, [row[:end] for row in rows], suppressed, window).nats
            for end in (LEFT, LEFT + GAP)
        ]
        found = [
            r | {"ar_nats": v} for r, v in zip(found, (ends[1] - ends[0]).tolist(), strict=True)
        ]
    if held.denoises:
        nats = stretch_bound(held, rows, LEFT, LEFT + GAP, session.sizes.draws, session.seed)
        found = [r | {"bound_nats": v} for r, v in zip(found, nats, strict=True)]
    return found


def _gap_figures(session: Session, found: Found, rows: Sequence[Row]) -> None:
    cells = cells_of(rows, "gap")
    base = cells.get(("base", BASELINE))
    for way in _fillers(session):
        cell = cells.get((way.held.key, way.setting))
        if cell is None:
            continue
        apart_ = base is not None and way.name != f"base, {BASELINE}"
        limits = {} if way.held.denoises else {"min_new_tokens": GAP}
        evidence = way.evidence(cell, max_new_tokens=0 if way.held.denoises else GAP, **limits)
        if way.held.denoises:
            evidence |= {"given_after": RIGHT, "read_after": _read_after(way.held)}
        add = partial(
            found.add, QUESTION, subject=way.held.key, setting=way.setting, evidence=evidence
        )
        exact = [row["exact"] for row in cell]
        difference = None
        if apart_:
            theirs = [row["exact"] for row in base]
            difference = apart("base", BASELINE, share_difference(exact, theirs))
        add("infill_exact_match", value=share(exact), difference=difference)
        if session.base is not None:
            ours, theirs = (
                ([row["nats"] for row in c], [row["tokens"] for row in c])
                for c in (cell, base or cell)
            )
            difference = apart("base", BASELINE, ratio_difference(ours, theirs)) if apart_ else None
            found.add(
                QUESTION, "infill_base_nll", way.held.key, ratio(*ours), setting=way.setting,
                difference=difference, evidence=evidence | {"estimator": "exact"},
            )  # fmt: skip
        if way.setting != RANKED:
            kept = [n < row["kept"] for row in cell for n in range(RIGHT)]
            value = share(kept)
            if 0 < value.value < 100:  # tokens of a text are not independent
                value = ratio([row["kept"] for row in cell], [RIGHT] * len(cell), scale=100.0)
            add("forced_kept", value=value)


def _middle_figures(session: Session, found: Found, rows: Sequence[Row]) -> None:
    cells: dict[str, list[Row]] = {}
    for row in rows:
        if "middle" in row:
            cells.setdefault(row["subject"], []).append(row)
    base = cells.get("base")
    for subject, cell in cells.items():
        wholes = [row["scored"] for row in cell]
        for kind, metric, estimator in (
            ("ar_nats", "infill_ar_nll", "exact"),
            ("bound_nats", "infill_bound", "bound"),
        ):
            if kind not in cell[0]:
                continue
            nats, difference = [row[kind] for row in cell], None
            if base is not None and subject != "base":
                theirs = [row["ar_nats"] for row in base], wholes
                difference = apart("base", None, ratio_difference((nats, wholes), theirs))
            found.add(
                QUESTION, metric, subject, ratio(nats, wholes), difference=difference,
                evidence={"estimator": estimator, "draws": session.sizes.draws},
            )  # fmt: skip


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
    written = _fill(session, way, [asked])
    return written, decode(written.prompts[0][len(prompt) :])


def _edit_figures(session: Session, found: Found, rows: Sequence[Row]) -> None:
    cells = cells_of(rows, "edit")
    base = cells.get(("base", BASELINE))
    for way in _fillers(session):
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
    texts = [session.decode(prompt) for prompt in prompts]
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
    _gap_figures(session, found, rows)
    _middle_figures(session, found, rows)
    _edit_figures(session, found, rows)
    for row in rows:
        if "ordered" in row and row["subject"] == "model":
            found.orders.append(
                Order(
                    prompt=row["ordered"], tokens=row["pieces"], forward=row["forward"],
                    confidence=row["confidence"],
                )
            )  # fmt: skip
    if not session.model.denoises:
        why = "a draft adapter has no diffusion mode"
        session.miss(QUESTION, "filling and revising by the model", why)
    return found
