"""Length: what a token costs, and how good it is, as prompts, answers and positions get longer."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import partial
from itertools import groupby
from typing import Any

import torch

from ..core.seeds import content_key, keyed_generator
from ..diffusion.corruption import draw_times, open_slots
from ..diffusion.likelihood import ar_nll, masked_nll, scored
from .estimates import Value, mean, middle, ratio, ratio_difference, share
from .figures import BASELINE
from .journal import Part, Row
from .quality import continued_nats, shape_of, worse_text
from .session import Found, Session, apart, taken
from .speed import peak_of
from .subjects import Held
from .writing import Way, batches

QUESTION = "length"
STRETCHES = 8  # of positions, up to the context
NARROWEST = 4  # tokens of a stretch
LEAST = 8  # texts, below which no error means much
JUDGED = 16  # answers of a length whose text is judged
WARMING = 16  # tokens of an answer before the first that is timed
PROFILED = 256  # tokens of an answer whose memory is measured, without a GPU
TOO_LONG = "profiling them takes too long on a CPU"
SHORT = "answers about images are too short to be read stretch by stretch"
WHOLE = "a question about an image is neither cut nor stretched, so only its own lengths were timed"
TOGETHER = 32  # rows of a forward that draws noise


def parts(session: Session) -> list[Part]:
    """What is measured: each pair of lengths, the likelihood by position, and where answers end."""
    found = []
    for prompt, answer in _lengths(session):
        cost = len(session.main_ways()) * session.sizes.length_repeats * answer * 3
        name = f"prompt {prompt}, answer {answer}"
        found.append(Part(QUESTION, name, cost, partial(_cell, session, prompt, answer)))
    for held in () if session.sees else session.subjects.values():
        rows = session.sizes.long_rows * STRETCHES * (session.sizes.draws if held.denoises else 1)
        run = partial(_positions, session, held)
        found.append(Part(QUESTION, f"likelihood by position, {held.key}", rows, run))
    stops = Part(
        QUESTION, "where answers end", session.sizes.long_rows * 20, partial(_stops, session)
    )
    return [*found, stops]


def _context(session: Session) -> int:
    """Tokens that a row may have in every subject, and at most what the sizes ask for."""
    longest = max(session.sizes.prompts) + max(session.sizes.answers)
    return min([longest, *(h.context for h in session.subjects.values() if h.context)])


def _lengths(session: Session) -> list[tuple[int, int]]:
    """Pairs of a prompt's and an answer's length that fit into the context in whole blocks."""
    block = max((h.checkpoint.read_as.block_length or 1) for h in session.subjects.values())
    contexts = [h.context for h in session.subjects.values() if h.context]
    return [
        (prompt, answer)
        for prompt in _prompt_lengths(session)
        for answer in session.sizes.answers
        if not contexts or prompt + answer <= min(contexts) // block * block
    ]


def _prompt_lengths(session: Session) -> Sequence[int]:
    """Those that the sizes ask for. A question about an image cannot be cut or stretched, so of
    these the shortest and the longest of which there are enough, if of any."""
    if not session.sees:
        return session.sizes.prompts
    counts = Counter(len(question.ids) for question in session.material.questions)
    found = [size for size in counts if counts[size] >= LEAST] or [*counts]
    return sorted({min(found), max(found)})


def _prompts_of(session: Session, length: int) -> list[list[int]]:
    """Prompts of a length."""
    if not session.sees:
        return long_rows(session, length)
    exact = [q for q in session.material.questions if len(q.ids) == length]
    return session.asked(exact[: session.sizes.long_rows])


def long_rows(session: Session, length: int, most: int | None = None) -> list[list[int]]:
    """The beginnings of held-out texts that are as long."""
    texts = session.encode(session.material.texts)
    most = most or session.sizes.long_rows
    return [ids[:length] for ids in texts if len(ids) >= length][:most]


def _filled(session: Session, length: int) -> list[list[int]]:
    """Rows of a length to be timed, of several texts each: what they say makes no difference."""
    ids = [token for text in session.encode(session.material.texts) for token in text]
    ids *= -(-length * session.sizes.length_repeats // len(ids))
    return batches(ids, length)[: session.sizes.length_repeats]


# Time and memory


def _cell(session: Session, prompt: int, answer: int) -> list[Row]:
    """Answers of exactly a length to prompts of a length, one prompt at a time, interleaved."""
    real = _prompts_of(session, prompt)
    prompts = real if session.sees or len(real) >= LEAST else _filled(session, prompt)
    ways, rows = session.main_ways(), []
    limits = {"max_new_tokens": answer, "min_new_tokens": answer}
    for repeat in range(session.sizes.length_repeats):
        group = [prompts[repeat % len(prompts)]]
        for way in ways[repeat % len(ways) :] + ways[: repeat % len(ways)]:
            call = partial(_timed, session, way, group, limits, repeat)
            row = session.attempt(QUESTION, f"prompt {prompt}, answer {answer} of {way.name}", call)
            if row is not None:
                about = {"subject": way.held.key, "setting": way.setting, "repeat": repeat}
                rows.append({**about, "prompt": prompt, "answer": answer, **row})
    if len(real) < LEAST:
        what = f"text after prompts of {prompt} tokens"
        are = "questions are as long" if session.sees else "texts are that long"
        session.miss(QUESTION, what, f"fewer than {LEAST} {are}")
    elif session.base is not None:
        for way in ways:
            what = f"text after prompts of {prompt} tokens of {way.name}"
            call = partial(_judged, session, way, real[:JUDGED], limits)
            about = {"subject": way.held.key, "setting": way.setting}
            about |= {"prompt": prompt, "answer": answer}
            rows += [about | row for row in session.attempt(QUESTION, what, call) or ()]
    on_gpu = session.model.checkpoint.model.device.type == "cuda"
    if answer > PROFILED and not on_gpu:
        session.miss(QUESTION, f"memory for answers of {answer} tokens", TOO_LONG)
        return rows
    for way in ways:
        what = f"memory for prompt {prompt}, answer {answer} of {way.name}"
        row = session.attempt(QUESTION, what, partial(peak_of, way, prompts[:1], answer))
        if row is not None:
            about = {"subject": way.held.key, "setting": way.setting}
            rows.append({**about, "prompt": prompt, "answer": answer, **row})
    return rows


def _timed(
    session: Session, way: Way, group: list[list[int]], limits: dict[str, int], repeat: int
) -> Row:
    if repeat == 0:  # warm
        way.write(group, session.clock, max_new_tokens=WARMING)
    written = way.write(group, session.clock, **limits)
    return {"seconds": written.seconds, **taken(written)}


def _judged(
    session: Session, way: Way, prompts: list[list[int]], limits: dict[str, int]
) -> list[Row]:
    """What the base says of answers of exactly a length."""
    written = way.write(prompts, session.clock, **limits)
    nats = continued_nats(session.base, prompts, written.answers)
    rows = [
        {"nats": value, "tokens": len(answer), "forwards": 0, "steps": 0, **shape_of(answer)}
        for answer, value in zip(written.answers, nats, strict=True)
    ]
    rows[-1] |= {"forwards": written.forwards, "steps": written.longest}
    return rows


# Likelihood by position


def _positions(session: Session, held: Held) -> list[Row]:
    """Nats of each stretch of long rows, given all that precedes it."""
    length = _context(session)
    width = max(NARROWEST, length // STRETCHES)
    found: list[Row] = []
    checkpoint = held.checkpoint
    window = checkpoint.spec_or_causal.local_window
    for first in range(0, length - width + 1, width):
        last, start = first + width, max(1, first)
        cut = long_rows(session, last)
        if len(cut) < LEAST:
            what = f"likelihood at positions from {first}"
            session.miss(QUESTION, what, f"fewer than {LEAST} texts are that long")
            break
        tokens = [int(scored(row, checkpoint.suppressed)[start:].sum()) for row in cut]
        ar = both = [None] * len(cut)
        if held.has_ar_mode:
            nats = ar_nll(checkpoint.model, cut, checkpoint.suppressed, window).nats
            before = [row[:start] for row in cut]
            nats = nats - ar_nll(checkpoint.model, before, checkpoint.suppressed, window).nats
            ar = nats.tolist()
        if held.denoises and not held.free:  # whose bound is one of whole blocks
            both = stretch_bound(held, cut, start, last, session.sizes.draws, session.seed)
        for number, (count, one, other) in enumerate(zip(tokens, ar, both, strict=True)):
            row = {"subject": held.key, "position": first, "row": number, "scored": count}
            found.append(row | {"ar_nats": one, "bound_nats": other})
    return found


@torch.no_grad()
def stretch_bound(
    held: Held, rows: Sequence[Sequence[int]], first: int, last: int, draws: int, seed: int
) -> list[float]:
    """Upper bound on -log p of the tokens in [first, last) of each row, given the rest of the row,
    as far as the model reads it. All rows have one length."""
    checkpoint = held.checkpoint
    spec, suppressed = checkpoint.spec, checkpoint.suppressed
    length = len(rows[0])
    block = torch.arange(length) // (spec.block_length or length)
    found = []
    for group in batches(rows, max(1, TOGETHER // draws)):
        masked, weight = [], []
        for row in group:
            generator = keyed_generator(seed, content_key(list(row)))
            within = scored(row, suppressed)
            within[:first] = within[last:] = False
            for times in draw_times(draws, int(block[-1]) + 1, generator):
                where, t = open_slots(within, block, times, generator)
                masked.append(where)
                weight.append(1 / t.clamp(min=1 / length))
        x0 = torch.tensor([list(row) for row in group for _ in range(draws)])
        where, weight = torch.stack(masked), torch.stack(weight)
        pos = torch.arange(length).expand_as(x0)
        ce = masked_nll(
            checkpoint.model, spec, x0, where, torch.zeros_like(x0), pos, suppressed
        )  # fmt: skip
        values = torch.zeros(x0.shape, dtype=torch.double)
        values[where] = ce.double() * weight[where]
        found += values.sum(1).view(len(group), draws).mean(1).tolist()
    return found


# Where answers end


def _stops(session: Session) -> list[Row]:
    """Whether answers to prompts end by themselves within the longest limit that is measured."""
    lengths = _lengths(session)
    if not lengths:
        return []
    limit = max(answer for _, answer in lengths)
    prompts = session.prompts(session.sizes.long_rows)
    rows = []
    for way in session.main_ways():
        call = partial(_ended, session, way, prompts, limit)
        found = session.attempt(QUESTION, f"where answers of {way.name} end", call) or []
        about = {"subject": way.held.key, "setting": way.setting, "limit": limit}
        rows += [about | row for row in found]
    return rows


def _ended(session: Session, way: Way, prompts: list[list[int]], limit: int) -> list[Row]:
    rows: list[Row] = []
    ends = set(way.held.checkpoint.end_ids)
    for group in batches(prompts, 8):
        written = way.write(group, session.clock, max_new_tokens=limit)
        for answer in written.answers:
            row = {"tokens": len(answer), "stopped": answer[-1] in ends, "forwards": 0, "steps": 0}
            rows.append(row)
        rows[-1] |= {"forwards": written.forwards, "steps": written.longest}
    return rows


# Figures


def figures(session: Session, rows: Sequence[Row]) -> Found:
    """The figures that the rows give."""
    found = Found()
    _cell_figures(session, found, rows)
    _position_figures(session, found, rows)
    _stop_figures(session, found, rows)
    if not _lengths(session):
        session.miss(QUESTION, "time by length", "the context is too short")
    if session.sees:
        session.miss(QUESTION, "likelihood by position", SHORT)
        session.miss(QUESTION, "prompts of any length", WHOLE)
    return found


def _way_of(session: Session, row: Row) -> Way:
    return next(w for w in session.ways(row["setting"]) if w.held.key == row["subject"])


def _cell_figures(session: Session, found: Found, rows: Sequence[Row]) -> None:
    timed, judged = (_cells(rows, kind) for kind in ("repeat", "nats"))
    for (prompt, answer, subject, setting), cell in timed.items():
        if len(cell) < 2:
            continue
        way, at = _way_of(session, cell[0]), {"prompt": prompt, "answer": answer}
        evidence = way.evidence(cell, max_new_tokens=answer, min_new_tokens=answer)
        base = timed.get((prompt, answer, "base", BASELINE)) if subject != "base" else None
        found.add(
            QUESTION, "seconds_per_token", subject,
            middle([row["seconds"] / row["tokens"] for row in cell]), setting=setting, at=at,
            difference=None if base is None else _slower(cell, base), evidence=evidence,
        )  # fmt: skip
    for (prompt, answer, subject, setting), cell in judged.items():
        way, at = _way_of(session, cell[0]), {"prompt": prompt, "answer": answer}
        evidence = way.evidence(cell, max_new_tokens=answer, min_new_tokens=answer)
        base = judged.get((prompt, answer, "base", BASELINE)) if subject != "base" else None
        add = partial(found.add, QUESTION, subject=subject, setting=setting, at=at)
        value = ratio([row["nats"] for row in cell], [row["tokens"] for row in cell])
        exact = evidence | {"estimator": "exact"}
        add("base_nll", value=value, difference=worse_text(cell, base), evidence=exact)
        fours = [row["fours"] for row in cell]
        if sum(fours):
            repeated = ratio([row["repeated"] for row in cell], fours, scale=100.0)
            add("repeated_4grams", value=repeated, evidence=evidence)
    for row in rows:
        if "peak" in row:
            found.add(
                QUESTION, "peak_bytes", row["subject"], Value(row["peak"], None, 1),
                setting=row["setting"], at={"prompt": row["prompt"], "answer": row["answer"]},
                evidence=_way_of(session, row).evidence([row], max_new_tokens=row["limit"]),
            )  # fmt: skip


def _cells(rows: Sequence[Row], kind: str) -> dict[Any, list[Row]]:
    """Rows that have a value of a kind, by lengths, subject and setting."""
    cells: dict[Any, list[Row]] = defaultdict(list)
    for row in rows:
        if kind in row and "prompt" in row:
            cells[row["prompt"], row["answer"], row["subject"], row["setting"]].append(row)
    return cells


def _slower(cell: Sequence[Row], base: Sequence[Row]) -> Any:
    """How many times as long a token takes as in the base, repeat by repeat."""
    theirs = {row["repeat"]: row["seconds"] / row["tokens"] for row in base}
    quotients = [
        row["seconds"] / row["tokens"] / theirs[row["repeat"]]
        for row in cell
        if row["repeat"] in theirs
    ]
    return apart("base", BASELINE, middle(quotients), ratio=True) if len(quotients) > 1 else None


def _position_figures(session: Session, found: Found, rows: Sequence[Row]) -> None:
    cells: dict[tuple[str, int], list[Row]] = defaultdict(list)
    for row in rows:
        if "position" in row:
            cells[row["subject"], row["position"]].append(row)
    for (subject, position), cell in cells.items():
        wholes, base = [row["scored"] for row in cell], cells.get(("base", position))
        for kind, metric, estimator in (
            ("ar_nats", "ar_nll", "exact"),
            ("bound_nats", "bound", "bound"),
        ):
            nats = [row[kind] for row in cell]
            if nats[0] is None or len(nats) < 2 or not sum(wholes):
                continue
            difference = None
            if base is not None and subject != "base":
                theirs = [row["ar_nats"] for row in base], [row["scored"] for row in base]
                difference = apart("base", None, ratio_difference((nats, wholes), theirs))
            found.add(
                QUESTION, metric, subject, ratio(nats, wholes), at={"position": position},
                difference=difference,
                evidence={"estimator": estimator, "draws": session.sizes.draws},
            )  # fmt: skip


def _stop_figures(session: Session, found: Found, rows: Sequence[Row]) -> None:
    ended = [row for row in rows if "stopped" in row]
    for (subject, setting), group in groupby(ended, key=lambda r: (r["subject"], r["setting"])):
        cell = list(group)
        limit = cell[0]["limit"]
        evidence = _way_of(session, cell[0]).evidence(cell, max_new_tokens=limit)
        add = partial(
            found.add, QUESTION, subject=subject, setting=setting, at={"answer": limit},
            evidence=evidence,
        )  # fmt: skip
        add("stopped", value=share([row["stopped"] for row in cell]))
        add("answer_tokens", value=mean([row["tokens"] for row in cell]))
